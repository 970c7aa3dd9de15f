"""Tokens on disk to batches, and the exact account of which of them a model has seen."""
