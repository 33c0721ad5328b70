"""Files, memory, signals and processes of the machine."""
