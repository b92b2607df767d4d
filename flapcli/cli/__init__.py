"""The command line: parse, call a stage, print. No torch at import."""
