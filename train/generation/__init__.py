"""Text from trained models, and their export."""
