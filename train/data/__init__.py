"""Data pipeline: text files and datasets to batches of tokens."""
