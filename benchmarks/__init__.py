"""Speed and memory, as ratios to a named alternative: `python -m benchmarks.NAME [--json]`."""
