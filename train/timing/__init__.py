"""Benchmark of optimizer updates and training steps."""
