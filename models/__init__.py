"""Flax models that know nothing of optimizers or training programs."""
