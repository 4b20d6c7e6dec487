# Generated from _async/__init__.py by `python scripts/unasync.py`: edit that file instead.
"""Synchronous client, and its transport for several servers."""
