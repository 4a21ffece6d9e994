"""Models: loading one, what is particular to its family, and the layers that text enters."""
