"""What ONNX Runtime makes of a file: its answers, its integer products, its speed."""
