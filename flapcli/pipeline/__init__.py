"""The stages as commands run them: find inputs, ask the cache, work, write the artifact.

A stage returns what it made or found, and whether the cache answered. Torch is imported only by the
stages that compute with it, and only when they do.
"""
