"""Model families as data, their reader, and the sizes that planning needs."""
