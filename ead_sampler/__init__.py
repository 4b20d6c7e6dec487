"""Temperature schedules, and the SGLang plugin that applies them inside the sampler.

What is here is imported on first use: SGLang loads the plugin in every environment that has any
part of ead, also where torch is missing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_OF_KINDS = ("PRESETS", "suggest_schedule")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "kinds" if name in _OF_KINDS else "schedule"
    return getattr(import_module(f"ead_sampler.{module}"), name)
