"""Prepared images, read: decoded, seen as views, and put together in batches."""
