"""The forward of a mixture: its passes, their caches, and the hooks that take part."""
