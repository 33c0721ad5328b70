"""Configurations of the programs: fields, units, defaults and presets."""
