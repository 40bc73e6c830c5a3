"""Generation in fewer forwards, with the same text."""
