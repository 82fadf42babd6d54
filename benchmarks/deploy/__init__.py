"""Exported files and programs in their runtimes: speed, size, agreement."""
