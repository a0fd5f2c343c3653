"""The Flower app of this deployment."""
