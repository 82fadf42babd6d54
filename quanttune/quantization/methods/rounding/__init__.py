"""What methods share that choose the codes of weights."""
