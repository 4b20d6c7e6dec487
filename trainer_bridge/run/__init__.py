"""A run: settings, answers, steps, evaluation, checkpoints, and what it leaves behind."""
