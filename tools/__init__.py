"""Scripts that make what ships with loramix; they are in the source distribution, not in the wheel."""
