"""Training of teachers and of generative denoisers."""
