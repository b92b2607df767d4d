"""flap: fluctuation-based adaptive structured pruning of language models."""

__version__ = "0.1.0"
