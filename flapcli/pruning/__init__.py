"""Stage 3: the checkpoint cut down to the plan, and what makes up for the channels that went."""
