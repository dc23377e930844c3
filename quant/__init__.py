"""Makes and judges GGUF files. Builds on `runtime`, knows nothing of screens."""
