"""From what a text is called to windows of tokens."""
