"""The adapted layers: the arithmetic of a mixture, and how the layers of a base model are replaced."""
