"""Stage 2: which heads and neurons stay. Needs statistics alone: no weights, no torch."""
