"""Exact generation in fewer forwards: lockstep, speculative decoding and prompt lookup for the two passes."""
