"""Many notebooks on one loaded model: a gateway beside the cluster, and what its guests have of it."""
