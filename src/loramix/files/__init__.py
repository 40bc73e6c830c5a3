"""Bytes on disk and on the Hub: finding files, JSON, tensors, atomic saves, base models.

Nothing here knows a configuration.
"""
