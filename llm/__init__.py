"""Tally: from raw text to a model you can chat with, and a ledger of every token it has seen."""

__version__ = "0.1.0"
