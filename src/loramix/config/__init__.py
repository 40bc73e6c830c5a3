"""Configurations, as values: of one expert and of a mixture, with the checks that they must pass."""
