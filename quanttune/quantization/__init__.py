"""Post-training quantization: what is quantized (coverage), with which ranges (calibrators), how
(simulation).
"""
