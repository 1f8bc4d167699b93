"""Every way of distributing a model, on every kind of model, against the same model in one process."""
