"""Post-training quantization: what is quantized (coverage), with which ranges (calibrators) and
codes (methods), how (simulation), with learned scales (lsq), and as files (saving).
"""
