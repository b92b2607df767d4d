"""Stage 4 of 5, and optional: a pruned model is trained to answer like the dense one."""
