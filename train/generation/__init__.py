"""Text generation with trained models, and their export."""
