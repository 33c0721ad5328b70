"""The stages that a low-rank optimizer is a chain of."""
