"""Pages of numbers that are there already: no file here knows a model."""
