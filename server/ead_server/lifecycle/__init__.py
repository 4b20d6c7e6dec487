"""What the server is doing now, how it ends, and who watches whom."""
