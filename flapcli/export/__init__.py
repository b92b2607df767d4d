"""Checkpoints in the forms of other runtimes, and on the hub."""
