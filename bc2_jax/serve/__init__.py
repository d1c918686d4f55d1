"""Serving: requests of many users over the rows of one batch."""
