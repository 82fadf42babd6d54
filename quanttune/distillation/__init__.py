"""A rounded Vision Transformer that is trained to attend as its float teacher does."""
