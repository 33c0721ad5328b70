"""Private modules of the library."""
