"""Moved to quanttune.deploy.products."""

from ..moved import moved

__getattr__ = moved(__name__, "quanttune.deploy.products")
