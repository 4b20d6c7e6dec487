"""`ead serve`: flags, models, and a server as a process."""
