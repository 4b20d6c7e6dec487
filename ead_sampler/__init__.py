"""Temperature schedules, and the SGLang plugin that applies them inside the sampler."""

from ead_sampler.schedule import PRESETS, Annealing, AnnealingError, parse_annealing

__all__ = ["PRESETS", "Annealing", "AnnealingError", "parse_annealing"]
