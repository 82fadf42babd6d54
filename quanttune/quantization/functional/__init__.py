"""What no module holds: products and sums of activations, found by their place in the code."""
