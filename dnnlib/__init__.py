"""General utilities that need no tensors."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout, where presets and assets are
