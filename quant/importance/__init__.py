"""Collects importance matrices: what every weight is multiplied with, on some text."""
