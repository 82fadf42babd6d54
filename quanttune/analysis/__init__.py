"""Look at a model before and after: ranges, plots, the report."""
