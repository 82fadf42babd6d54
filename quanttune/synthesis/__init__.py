"""Inputs for calibration that are made from a model alone, where there are no data."""
