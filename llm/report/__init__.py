"""A run's record as plots and one HTML file, read from what training and evaluation left in its folder; no torch, no checkpoint is opened."""
