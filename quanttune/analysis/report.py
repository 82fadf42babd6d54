"""Moved to quanttune.report.report."""

from ..moved import moved

__getattr__ = moved(__name__, "quanttune.report.report")
