"""Checkpoints in the forms of other runtimes."""
