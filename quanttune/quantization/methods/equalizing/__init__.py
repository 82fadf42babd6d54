"""What methods share that change norms and their readers together."""
