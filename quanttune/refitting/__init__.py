"""Linear modules solved anew, so that a model gives its answers with smaller ranges."""
