"""Configurations of the programs: fields, units, defaults, presets."""
