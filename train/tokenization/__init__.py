"""Tokenizers and their special tokens."""
