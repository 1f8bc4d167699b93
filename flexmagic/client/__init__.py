"""What lives in the notebook's process: the cluster, the session, runs and activations."""
