"""Flax models and their weights' import and export."""
