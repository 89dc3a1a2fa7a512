"""General utilities that need no tensors."""
