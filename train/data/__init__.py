"""From text files and datasets to batches of tokens."""
