"""What is refused before any work: keys, headers, bodies, limits; and how the server is."""
