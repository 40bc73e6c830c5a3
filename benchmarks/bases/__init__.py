"""Base models of every architecture of transformers, tiny and random, and what a mixture on them is checked for."""
