"""Stages of low-rank optimizers, to be chained."""
