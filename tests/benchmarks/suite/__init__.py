"""What flexmagic costs, as ratios against named baselines in one run: ``make bench``."""
