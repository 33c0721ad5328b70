"""Comparison of optimizers by trials."""
