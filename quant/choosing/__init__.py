"""Chooses the type of each tensor: what every choice would cost in quality, and the best choice for a size."""
