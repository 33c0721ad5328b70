"""One training step: optimizer, shardings, compiled functions."""
