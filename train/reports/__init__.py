"""Plots that several programs draw."""
