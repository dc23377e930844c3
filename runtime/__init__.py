"""Loads GGUF models and speaks their language. Knows nothing of quantizing or of screens."""

__version__ = "0.1.0"
