"""`POST /v1/rollouts`: the request, the work, and how its answers are written."""
