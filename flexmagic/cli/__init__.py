"""The command line: `flexmagic demo`, `flexmagic kernel install`."""
