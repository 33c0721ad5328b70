"""Tokenizers: backends, special tokens, download from the hub."""
