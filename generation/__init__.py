"""From seeds to batches of images, and from arrays to pictures."""
