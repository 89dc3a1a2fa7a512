"""Images on disk: data sets in EDM2's format, read, written and converted."""
