"""Stage 4: what pruning cost and what it saved."""
