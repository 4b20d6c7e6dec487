"""Temperature schedules, and the SGLang plugin that applies them inside the sampler."""

from ead_sampler.kinds import PRESETS, suggest_schedule
from ead_sampler.schedule import REGISTRY, Annealing, AnnealingError, parse_annealing

__all__ = [
    "PRESETS",
    "REGISTRY",
    "Annealing",
    "AnnealingError",
    "parse_annealing",
    "suggest_schedule",
]
