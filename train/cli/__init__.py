"""Command lines: parsing, help and errors of one line."""
