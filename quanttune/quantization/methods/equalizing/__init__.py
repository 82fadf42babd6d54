"""What methods share that change LayerNorms and their readers together."""
