"""A routing on screen: pictures, a terminal, a notebook, and live text."""
