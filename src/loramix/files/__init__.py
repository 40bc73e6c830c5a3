"""Files on disk and on the Hub: JSON, tensors, atomic saves, base models.

Nothing here knows an adapter's configuration.
"""
