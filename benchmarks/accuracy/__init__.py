"""What models are worth: losses, settings, methods, refits, zero points."""
