"""What the kernels and a training step cost on a CPU, beside plain PyTorch and rivals."""
