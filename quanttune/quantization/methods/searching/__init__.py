"""Scales that are searched by what products make of rounded factors."""
