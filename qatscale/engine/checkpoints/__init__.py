"""Checkpoints free of the layout they were saved under, and the way to and from other formats."""
