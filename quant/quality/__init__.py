"""Judges a level: perplexity, divergence from the original, speed, size; and reports it."""
