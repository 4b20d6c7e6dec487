"""Asynchronous client, and its transport for several servers."""
