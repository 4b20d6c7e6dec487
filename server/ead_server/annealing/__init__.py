"""The fields `annealing` and `rollout` on every route, and the routes of schedules."""
