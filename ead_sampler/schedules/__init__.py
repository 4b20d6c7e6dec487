"""Every kind of schedule, one class each. To add one: a class in one of these files, and a test.

Importing this makes all of them known to `parse_annealing`.
"""

from ead_sampler.errors import AnnealingError, FieldError
from ead_sampler.schedules.base import (
    DEFAULT_SCHEDULE,
    MAX_STEP,
    REGISTRY,
    Annealing,
    MeanMatched,
    Numbers,
    PositionSchedule,
    Temperature,
    Tokens,
    check_all_steps,
    parse_annealing,
    register,
    short_repr,
    with_integers,
)
from ead_sampler.schedules.by_position import (
    MAX_KNOTS,
    PRESETS,
    Constant,
    Cosine,
    Ead,
    Exponential,
    Linear,
    Piecewise,
    Reverse,
    TwoStage,
)
from ead_sampler.schedules.by_segment import Segment
from ead_sampler.schedules.by_uncertainty import Branch, EadEntropy, Entropy
from ead_sampler.schedules.sampling_params import check_beam_width, check_sampling
from ead_sampler.schedules.suggest import suggest_schedule
from ead_sampler.schedules.vocabulary import MAX_MARKS

__all__ = [
    "DEFAULT_SCHEDULE",
    "MAX_KNOTS",
    "MAX_MARKS",
    "MAX_STEP",
    "PRESETS",
    "REGISTRY",
    "Annealing",
    "AnnealingError",
    "Branch",
    "Constant",
    "Cosine",
    "Ead",
    "EadEntropy",
    "Entropy",
    "Exponential",
    "FieldError",
    "Linear",
    "MeanMatched",
    "Numbers",
    "Piecewise",
    "PositionSchedule",
    "Reverse",
    "Segment",
    "Temperature",
    "Tokens",
    "TwoStage",
    "check_all_steps",
    "check_beam_width",
    "check_sampling",
    "parse_annealing",
    "register",
    "short_repr",
    "suggest_schedule",
    "with_integers",
]
