"""Planning: memory and communication of a run, without its hardware."""
