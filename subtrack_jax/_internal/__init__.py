"""Parts of the library that nobody outside of it may use."""
