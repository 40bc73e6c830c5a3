"""Routing records: what the layers mixed by, token by token."""
