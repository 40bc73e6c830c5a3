"""Routing records: the final scalings of each token."""
