"""Studies: methods, seeds and variants on one grid of step sizes, what came of them, and how sure that is."""
