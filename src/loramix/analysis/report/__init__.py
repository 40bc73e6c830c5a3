"""A routing as one HTML file."""
