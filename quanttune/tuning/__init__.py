"""Outlier-driven fine-tuning: which tensors (sites), their hooks (observers), the loss."""
