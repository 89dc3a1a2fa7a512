"""Networks whose features the metrics compare, and their weights."""
