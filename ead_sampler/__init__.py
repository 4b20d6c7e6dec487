"""Temperature schedules, and the SGLang plugin that applies them inside the sampler.

What is here is imported on first use: SGLang loads the plugin in every environment that has any
part of ead, also where torch is missing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ead_sampler.schedules import (
        PRESETS,
        REGISTRY,
        Annealing,
        AnnealingError,
        FieldError,
        parse_annealing,
        suggest_schedule,
    )

__all__ = [
    "PRESETS",
    "REGISTRY",
    "Annealing",
    "AnnealingError",
    "FieldError",
    "parse_annealing",
    "suggest_schedule",
]


try:
    __version__ = version("ead")
except PackageNotFoundError:  # a copy of the sources, which nothing has installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module("ead_sampler.schedules"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise ModuleNotFoundError(
            f"ead_sampler.{name} needs {missing}, which comes with the extra 'trainer' or "
            "'server' of ead: pip install 'ead[trainer]', or pip install '.[trainer]' in a clone",
            name=error.name,
        ) from error
