"""What a mixture's routing does, seen from outside the core."""
