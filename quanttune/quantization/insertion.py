"""Moved to quanttune.quantization.state."""

from ..moved import moved

__getattr__ = moved(__name__, "quanttune.quantization.state")
