"""Serving a mixture (empty so far)."""
