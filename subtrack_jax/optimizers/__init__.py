"""The optimizers of the family, one file per paper."""
