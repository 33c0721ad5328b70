"""Operating system: files, memory, signals, processes, console."""
