"""Studies: methods, seeds and variants on one grid of step sizes, and their results."""
