"""Schedules that look at the entropy of the next token. Legend: B = rows, V = vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ead_sampler.errors import AnnealingError
from ead_sampler.schedules.base import (
    Numbers,
    register,
)
from ead_sampler.schedules.by_position import Ead, EadNumbers, Range


class _Entropic(Range):
    """Kinds in which the temperature rises with the entropy H of the model's next token."""

    entropy_scale: float = Field(
        3.0, ge=0.001, le=100.0, description="H in nats from which on the temperature is highest"
    )
    exponent: float = Field(1.0, ge=0.01, le=100.0, description="of H / entropy_scale")

    uses_entropy: ClassVar[bool] = True


@register
class Entropy(_Entropic):
    """tau_min + (tau_max - tau_min) (H / entropy_scale)^exponent, as dynamic temperature does."""

    schedule: Literal["entropy"] = "entropy"

    def parameters(self) -> tuple[float, ...]:
        return (self.tau_max, self.tau_min, self.entropy_scale, self.exponent)

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        tau_max, tau_min, scale, exponent = numbers[:4]
        return torch.lerp(tau_min, tau_max, (entropy / scale).clamp(0.0, 1.0) ** exponent)


@register
class EadEntropy(_Entropic, EadNumbers):
    """EAD as the envelope of `entropy`: its tau_max falls with t as EAD's temperature does."""

    schedule: Literal["ead+entropy"] = "ead+entropy"

    def parameters(self) -> tuple[float, ...]:
        return (*EadNumbers.parameters(self), self.entropy_scale, self.exponent)

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        envelope = Ead.evaluate(t, numbers, entropy)
        _, tau_min, _, _, scale, exponent = numbers[:6]
        return torch.lerp(tau_min, envelope, (entropy / scale).clamp(0.0, 1.0) ** exponent)


@register
class Branch(Range):
    """tau_max at the tokens of highest entropy, a share `top` of them, and tau_min elsewhere.

    Which entropies are the highest is known only at the end of an answer, so a threshold follows
    them: after each token it moves up by rate (1 - top) if the entropy was above it and down by
    rate * top if not, and so settles where a share `top` is above (Robbins and Monro, 1951).

    What it has reached is not in the tokens, so an answer that is resumed (`position_offset`) must
    say where it starts again: worked out in this way from the `entropies` recorded before.
    """

    schedule: Literal["branch"] = "branch"
    top: float = Field(0.2, ge=0.001, le=0.999, description="share of tokens sampled hot")
    threshold: float = Field(
        0.672, ge=0.0, le=100.0, description="nats; where it starts, required with position_offset"
    )
    rate: float = Field(0.05, ge=0.0, le=10.0, description="nats; 0 keeps the threshold fixed")

    uses_entropy: ClassVar[bool] = True
    has_state: ClassVar[bool] = True
    own_number: ClassVar[int | None] = 2  # the threshold

    @model_validator(mode="after")
    def _resumes_where_it_was(self) -> Branch:
        if self.position_offset and self.rate and "threshold" not in self.model_fields_set:
            raise AnnealingError(
                "annealing.threshold",
                "is required with position_offset: the one reached, which follows from the "
                "entropies H so far: threshold + rate * ((H > threshold) - top), token by token",
            )
        return self

    def parameters(self) -> tuple[float, ...]:
        return (self.tau_max, self.tau_min, self.threshold, self.top, self.rate)

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        """The third number is the threshold now."""
        tau_max, tau_min, threshold = numbers[:3]
        return torch.where(entropy > threshold, tau_max, tau_min)

    def initial_state(self, generated: Sequence[int]) -> tuple[float, float, float]:
        return 0.0, 0.0, self.threshold

    @staticmethod
    def next_number(number: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        """The threshold after a token of this entropy: float64 [B]."""
        top, rate = numbers[3:5]
        return number + rate * ((entropy > number).double() - top)
