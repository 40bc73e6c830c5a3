"""What a user calls: building and loading a mixture, and the methods that a model gains."""

from loramix.model.trl import watch

watch()
