"""A run's folder: its files written, read back and checked, and the models in it."""
