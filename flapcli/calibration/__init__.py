"""Stage 1: how much every channel fluctuates on a text."""
