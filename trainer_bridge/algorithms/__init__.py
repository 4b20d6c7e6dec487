"""The mathematics: log-probabilities, advantages, losses, corrections, estimators."""
