"""Memory and communication of a run, without the hardware."""
