"""Scripts that print measured ratios; run one by its path. No test depends on a time."""
