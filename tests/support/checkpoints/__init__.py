"""Tiny checkpoints, and every container to put them in."""
