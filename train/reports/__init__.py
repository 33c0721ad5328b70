"""Plots and tables of the programs."""
