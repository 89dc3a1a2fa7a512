"""Utilities around PyTorch: distributed execution and the reading of untrusted checkpoint files."""
