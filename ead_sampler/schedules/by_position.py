"""Schedules whose temperature follows from the position of the token alone.

Exploratory Annealed Decoding (EAD, arXiv 2510.05251) at token t and training step s:

    tau_t = 1                                              for t < warmup
    tau_t = max(1 + tau_max - exp(t / d_s), tau_min)       otherwise
    d_s   = min(decay + decay_growth * s, decay_cap)       tokens

The others are the comparisons that a study of EAD needs. Legend: B = rows.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ead_sampler.errors import AnnealingError
from ead_sampler.schedules.base import (
    TAU_HIGHEST,
    TAU_LOWEST,
    Annealing,
    Numbers,
    PositionSchedule,
    Temperature,
    Tokens,
    register,
    short_repr,
)

PRESETS: dict[str, dict[str, float]] = {
    "recipe": {"decay": 500.0, "decay_growth": 100.0, "decay_cap": 800_000.0},
    "paper": {"decay": 25.0, "decay_growth": 5.0, "decay_cap": 40_000.0},
}
# The paper's printed numbers and those of its public code differ by a factor of 20 in d_s; what
# was really run is the default.
_DEFAULT = PRESETS["recipe"]


class Range(Annealing):
    """Kinds between a highest and a lowest temperature."""

    tau_max: Temperature = Field(1.2, description="highest temperature")
    tau_min: Temperature = Field(0.1, description="lowest temperature")

    def bounds(self) -> tuple[float, float]:
        return self.tau_min, self.tau_max

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.tau_min > self.tau_max:
            raise AnnealingError(
                "annealing.tau_min",
                f"must be in [{TAU_LOWEST}, tau_max = {self.tau_max}], got {self.tau_min}",
            )
        return self


class EadNumbers(Range):
    """The numbers of the paper's formula."""

    preset: Literal["recipe", "paper"] | None = Field(
        None, description="named decay, decay_growth and decay_cap; explicit numbers win"
    )
    length: float | None = Field(
        None,
        ge=1.0,
        le=1e9,
        description="tokens of a usual answer, in place of preset and decay numbers: the last "
        "temperature is reached halfway, and warmup fits unless it is given",
    )
    decay: Tokens = Field(_DEFAULT["decay"], description="d_0, tokens")
    decay_growth: float = Field(
        _DEFAULT["decay_growth"], ge=0.0, le=1e9, description="g, tokens per training step"
    )
    decay_cap: Tokens = Field(_DEFAULT["decay_cap"], description="largest d_s, tokens")
    warmup: int = Field(10, ge=0, le=1_000_000, description="first tokens, at temperature 1")

    warmup_fits_length: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset_or_length(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if raw.get("length") is not None:
            for name in ("preset", "decay", "decay_growth", "decay_cap"):
                if raw.get(name) is not None:
                    message = f"sets the decay numbers, and cannot be combined with {name}"
                    raise AnnealingError("annealing.length", message)
            return cls._sized(raw)
        preset = raw.get("preset")
        # an unknown preset is reported by its own field
        return {**PRESETS.get(preset, {}), **raw} if isinstance(preset, str) else raw

    @classmethod
    def _sized(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """With numbers that reach tau_min at half of `length`, and no length any more. The first
        eighth or so is then above temperature 1, as the paper's rule of thumb has it."""
        length, tau_max, tau_min = raw["length"], raw.get("tau_max", 1.2), raw.get("tau_min", 0.1)
        numbers = all(type(number) in (int, float) for number in (length, tau_max, tau_min))
        if not numbers or not 1 <= length <= 1e9 or not 0 < tau_min <= tau_max <= TAU_HIGHEST:
            return raw  # each is reported by its own field
        floor_at = max(length / 2, 1.0)
        # the floor is where exp(t / d) = 1 + tau_max - tau_min
        floor = math.log(1 + tau_max - tau_min)
        decay = min(floor_at / floor, 1e9) if floor > 0 else floor_at
        sized: dict[str, Any] = {"decay": decay, "decay_growth": 0.0, "decay_cap": decay}
        if cls.warmup_fits_length:
            above_one = decay * math.log(tau_max) if tau_max > 1 else 0.0
            sized["warmup"] = min(10, int(min(above_one, floor_at)))
        return {**sized, **raw, "length": None}

    @property
    def decay_now(self) -> float:
        """d_s in tokens, at this schedule's step (0 when no step is known)."""
        return min(self.decay + self.decay_growth * (self.step or 0), self.decay_cap)

    def parameters(self) -> tuple[float, ...]:
        return (self.tau_max, self.tau_min, self.decay_now, float(self.warmup))

    def bounds(self) -> tuple[float, float]:
        return min(self.tau_min, 1.0), max(self.tau_max, 1.0)


@register
class Ead(EadNumbers, PositionSchedule):
    """The paper's schedule."""

    schedule: Literal["ead"] = "ead"

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        tau_max, tau_min, decay, warmup = numbers[:4]
        return _ead(t, tau_max, tau_min, decay).masked_fill(t < warmup, 1.0)


@register
class Reverse(EadNumbers, PositionSchedule):
    """EAD upside down: from tau_min up to tau_max, at the same pace. Exploits first."""

    schedule: Literal["reverse"] = "reverse"
    warmup_fits_length: ClassVar[bool] = False  # it begins cool
    warmup: int = Field(0, ge=0, le=1_000_000, description="first tokens, at temperature 1")

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        tau_max, tau_min, decay, warmup = numbers[:4]
        mirrored = tau_min + (tau_max - _ead(t, tau_max, tau_min, decay))
        return torch.minimum(mirrored, tau_max).masked_fill(t < warmup, 1.0)


@register
class Constant(PositionSchedule):
    """One temperature, recorded like any other schedule's."""

    schedule: Literal["constant"] = "constant"
    tau: Temperature = Field(1.0, description="the temperature")

    def parameters(self) -> tuple[float, ...]:
        return (self.tau,)

    def bounds(self) -> tuple[float, float]:
        return self.tau, self.tau

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        return numbers[0]


class _Falling(Range, PositionSchedule):
    """Kinds that fall from tau_max at t = 0 towards tau_min, at a pace set by `length`."""

    length: Tokens = Field(512.0, description="tokens at step 0; of the kind's own formula")
    length_growth: float = Field(0.0, ge=0.0, le=1e9, description="tokens per training step")

    def parameters(self) -> tuple[float, ...]:
        length = min(self.length + self.length_growth * (self.step or 0), 1e9)
        return (self.tau_max, self.tau_min, length)

    @staticmethod
    def fallen(x: Tensor) -> Tensor:
        """How far it has fallen at t / length = x: 0 is tau_max, 1 is tau_min."""
        raise NotImplementedError

    @classmethod
    def evaluate(cls, t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        tau_max, tau_min, length = numbers[:3]
        return torch.lerp(tau_max, tau_min, cls.fallen(t / length))


@register
class Linear(_Falling):
    """A straight line from tau_max to tau_min, which it reaches at t = length."""

    schedule: Literal["linear"] = "linear"

    @staticmethod
    def fallen(x: Tensor) -> Tensor:
        return x.clamp(max=1.0)


@register
class Cosine(_Falling):
    """Half a cosine from tau_max to tau_min, which it reaches at t = length."""

    schedule: Literal["cosine"] = "cosine"

    @staticmethod
    def fallen(x: Tensor) -> Tensor:
        return (1.0 - torch.cos(math.pi * x.clamp(max=1.0))) / 2


@register
class Exponential(_Falling):
    """tau_min + (tau_max - tau_min) exp(-t / length): approaches tau_min, never reaches it."""

    schedule: Literal["exponential"] = "exponential"

    @staticmethod
    def fallen(x: Tensor) -> Tensor:
        return -torch.expm1(-x)


@register
class TwoStage(Range, PositionSchedule):
    """tau_max for the first `switch` tokens, tau_min after them."""

    schedule: Literal["two_stage"] = "two_stage"
    switch: int = Field(128, ge=0, le=1_000_000_000, description="tokens at tau_max")

    def parameters(self) -> tuple[float, ...]:
        return (self.tau_max, self.tau_min, float(self.switch))

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        tau_max, tau_min, switch = numbers[:3]
        return torch.where(t < switch, tau_max, tau_min)


MAX_KNOTS = 16


@register
class Piecewise(PositionSchedule):
    """Straight lines between knots (t, tau); constant before the first and after the last."""

    schedule: Literal["piecewise"] = "piecewise"
    knots: list[Annotated[list[float], Field(fail_fast=True)]] = Field(
        ...,
        min_length=1,
        max_length=MAX_KNOTS,
        description="[[t, tau], ...], t rising",
        json_schema_extra={
            "items": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "prefixItems": [
                    {"type": "number", "minimum": 0, "maximum": 1e9},
                    {"type": "number", "minimum": TAU_LOWEST, "maximum": TAU_HIGHEST},
                ],
            }
        },
    )

    @field_validator("knots")
    @classmethod
    def _check_knots(cls, knots: list[list[float]]) -> list[list[float]]:
        before = -1.0
        for index, knot in enumerate(knots):
            path = f"annealing.knots[{index}]"
            if len(knot) != 2:
                raise AnnealingError(path, f"must be [t, tau], got {short_repr(knot)}")
            t, tau = knot
            if not before < t <= 1e9 or t < 0:
                low = "0" if index == 0 else f"above {before:g}"
                raise AnnealingError(path, f"t must be in [{low}, 1e9] and rising, got {t}")
            if not TAU_LOWEST <= tau <= TAU_HIGHEST:
                allowed = f"[{TAU_LOWEST}, {TAU_HIGHEST}]"
                raise AnnealingError(path, f"tau must be in {allowed}, got {tau}")
            before = t
        return knots

    def parameters(self) -> tuple[float, ...]:
        times, taus = zip(*self.knots, strict=True)
        rest = MAX_KNOTS - len(self.knots)
        return (*times, *[times[-1]] * rest, *taus, *[taus[-1]] * rest)

    def bounds(self) -> tuple[float, float]:
        taus = [tau for _, tau in self.knots]
        return min(taus), max(taus)

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        times = torch.stack(numbers[:MAX_KNOTS], dim=1)
        taus = torch.stack(numbers[MAX_KNOTS : 2 * MAX_KNOTS], dim=1)
        passed = (times <= t.unsqueeze(1)).sum(1)
        left = (passed - 1).clamp(min=0).unsqueeze(1)
        right = passed.clamp(max=MAX_KNOTS - 1).unsqueeze(1)
        t0, t1 = times.gather(1, left).squeeze(1), times.gather(1, right).squeeze(1)
        tau0, tau1 = taus.gather(1, left).squeeze(1), taus.gather(1, right).squeeze(1)
        # where both ends are the same knot, the fraction is anything and the line is flat
        fraction = ((t - t0) / (t1 - t0).clamp(min=1e-12)).clamp(0.0, 1.0)
        return torch.lerp(tau0, tau1, fraction)


def _ead(t: Tensor, tau_max: Tensor, tau_min: Tensor, decay: Tensor) -> Tensor:
    # 1 + tau_max - exp(x), without rounding above tau_max; infinite exponentials meet the floor
    return torch.maximum(tau_max - torch.expm1(t / decay), tau_min)
