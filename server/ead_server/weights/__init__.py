"""New weights while the server runs: what must come, how it comes, and when it is served."""
