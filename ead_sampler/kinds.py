"""Every kind of schedule, one class each. To add one: a class here and a test.

Exploratory Annealed Decoding (EAD, arXiv 2510.05251) at token t and training step s:

    tau_t = 1                                              for t < warmup
    tau_t = max(1 + tau_max - exp(t / d_s), tau_min)       otherwise
    d_s   = min(decay + decay_growth * s, decay_cap)       tokens

The other kinds are the comparisons that a study of EAD needs. Legend: B = rows, V = vocabulary.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import (
    Field,
    SerializeAsAny,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from torch import Tensor

from ead_sampler.schedule import (
    REGISTRY,
    TAU_HIGHEST,
    TAU_LOWEST,
    Annealing,
    AnnealingError,
    Numbers,
    PositionSchedule,
    Temperature,
    Tokens,
    parse_annealing,
    register,
    shown,
)

PRESETS: dict[str, dict[str, float]] = {
    "recipe": {"decay": 500.0, "decay_growth": 100.0, "decay_cap": 800_000.0},
    "paper": {"decay": 25.0, "decay_growth": 5.0, "decay_cap": 40_000.0},
}
# The paper's printed numbers and those of its public code differ by a factor of 20 in d_s; what
# was really run is the default.
_DEFAULT = PRESETS["recipe"]


class _Range(Annealing):
    """Kinds between a highest and a lowest temperature."""

    tau_max: Temperature = Field(1.2, description="highest temperature")
    tau_min: Temperature = Field(0.1, description="lowest temperature")

    def bounds(self) -> tuple[float, float]:
        return self.tau_min, self.tau_max

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if self.tau_min > self.tau_max:
            raise AnnealingError(
                "annealing.tau_min",
                f"must be in [{TAU_LOWEST}, tau_max = {self.tau_max}], got {self.tau_min}",
            )
        return self


# --- by position -------------------------------------------------------------------------------


class _EadNumbers(_Range):
    """The numbers of the paper's formula."""

    preset: Literal["recipe", "paper"] | None = Field(
        None, description="named decay, decay_growth and decay_cap; explicit numbers win"
    )
    decay: Tokens = Field(_DEFAULT["decay"], description="d_0, tokens")
    decay_growth: float = Field(
        _DEFAULT["decay_growth"], ge=0.0, le=1e9, description="g, tokens per training step"
    )
    decay_cap: Tokens = Field(_DEFAULT["decay_cap"], description="largest d_s, tokens")
    warmup: int = Field(10, ge=0, le=1_000_000, description="first tokens, at temperature 1")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        preset = raw.get("preset")
        # an unknown preset is reported by its own field
        return {**PRESETS.get(preset, {}), **raw} if isinstance(preset, str) else raw

    @property
    def decay_now(self) -> float:
        """d_s in tokens, at this schedule's step (0 when no step is known)."""
        return min(self.decay + self.decay_growth * (self.step or 0), self.decay_cap)

    def parameters(self) -> tuple[float, ...]:
        return (self.tau_max, self.tau_min, self.decay_now, float(self.warmup))

    def bounds(self) -> tuple[float, float]:
        return min(self.tau_min, 1.0), max(self.tau_max, 1.0)


@register
class Ead(_EadNumbers, PositionSchedule):
    """The paper's schedule."""

    schedule: Literal["ead"] = "ead"

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        tau_max, tau_min, decay, warmup = numbers[:4]
        return _ead(t, tau_max, tau_min, decay).masked_fill(t < warmup, 1.0)


@register
class Reverse(_EadNumbers, PositionSchedule):
    """EAD upside down: from tau_min up to tau_max, at the same pace. Exploits first."""

    schedule: Literal["reverse"] = "reverse"
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


class _Falling(_Range, PositionSchedule):
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
class TwoStage(_Range, PositionSchedule):
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
                raise AnnealingError(path, f"must be [t, tau], got {shown(knot)}")
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


# --- by uncertainty ----------------------------------------------------------------------------


class _Entropic(_Range):
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
class EadEntropy(_Entropic, _EadNumbers):
    """EAD as the envelope of `entropy`: its tau_max falls with t as EAD's temperature does."""

    schedule: Literal["ead+entropy"] = "ead+entropy"

    def parameters(self) -> tuple[float, ...]:
        return (*_EadNumbers.parameters(self), self.entropy_scale, self.exponent)

    @staticmethod
    def evaluate(t: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        envelope = Ead.evaluate(t, numbers, entropy)
        _, tau_min, _, _, scale, exponent = numbers[:6]
        return torch.lerp(tau_min, envelope, (entropy / scale).clamp(0.0, 1.0) ** exponent)


@register
class Branch(_Range):
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
        """The third number is the threshold now, see ead_sampler.rows."""
        tau_max, tau_min, threshold = numbers[:3]
        return torch.where(entropy > threshold, tau_max, tau_min)

    def initial_state(self, generated: Sequence[int]) -> tuple[float, float, float]:
        return 0.0, 0.0, self.threshold

    @staticmethod
    def next_threshold(threshold: Tensor, numbers: Numbers, entropy: Tensor) -> Tensor:
        """The threshold after a token of this entropy: float64 [B]."""
        top, rate = numbers[3:5]
        return threshold + rate * ((entropy > threshold).double() - top)


# --- by segments -------------------------------------------------------------------------------

MAX_MARKS = 1024  # token ids that may restart a clock
TokenIds = list[int]


# Of any kind without state, see Segment._parse_part; the base class alone has too few fields.
Part = Annotated[SerializeAsAny[Annealing], WithJsonSchema({"type": "object"})]


@register
class Segment(Annealing):
    """`thinking`, whose clock restarts after given tokens, and `answer` after the end of thinking.

    A clock restarts (t = 0) with the token that follows a mark. A string marks every token whose
    text contains it; one that no single token contains is refused, since where it ends would
    depend on how the model happens to spell it.
    """

    schedule: Literal["segment"] = "segment"
    thinking: Part = Field(..., description="schedule from the first token")
    answer: Part | None = Field(None, description="schedule after the end of thinking")
    restart_token_ids: TokenIds = Field([], max_length=MAX_MARKS)
    restart_strings: list[str] = Field([], max_length=16)
    end_of_thinking_token_ids: TokenIds = Field([], max_length=MAX_MARKS)
    end_of_thinking_strings: list[str] = Field([], max_length=16)

    has_state: ClassVar[bool] = True

    @field_validator("thinking", "answer", mode="before")
    @classmethod
    def _parse_part(cls, raw: Any, info: Any) -> Any:
        if raw is None:
            return raw
        path = f"annealing.{info.field_name}"
        try:
            part = raw if isinstance(raw, Annealing) else parse_annealing(raw)
        except AnnealingError as error:
            field = path + error.field.removeprefix("annealing")
            raise AnnealingError(field, error.message) from None
        if part.has_state:
            allowed = ", ".join(name for name, kind in REGISTRY.items() if not kind.has_state)
            raise AnnealingError(
                f"{path}.schedule", f"must be one of {allowed}, got '{part.schedule}'"
            )
        if part.position_offset:
            raise AnnealingError(f"{path}.position_offset", "belongs to the whole schedule")
        return part

    @field_validator("restart_token_ids", "end_of_thinking_token_ids")
    @classmethod
    def _check_ids(cls, ids: TokenIds, info: Any) -> TokenIds:
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < 2**31:
                path = f"annealing.{info.field_name}[{index}]"
                raise AnnealingError(path, f"must be an integer in [0, 2^31), got {token_id}")
        return sorted(set(ids))

    @field_validator("restart_strings", "end_of_thinking_strings")
    @classmethod
    def _check_strings(cls, strings: list[str], info: Any) -> list[str]:
        for index, string in enumerate(strings):
            path = f"annealing.{info.field_name}[{index}]"
            if not 1 <= len(string) <= 100:
                raise AnnealingError(path, f"must have 1 to 100 characters, got {len(string)}")
            if _BETWEEN in string:
                raise AnnealingError(path, f"must have no NUL character, got {shown(string)}")
        return strings

    @model_validator(mode="after")
    def _answer_can_begin(self) -> Segment:
        ends = bool(self.end_of_thinking_token_ids or self.end_of_thinking_strings)
        if ends != (self.answer is not None):
            given, missing = ("end_of_thinking_*", "answer") if ends else ("answer", "an end")
            raise AnnealingError(
                "annealing.answer" if ends else "annealing.end_of_thinking_token_ids",
                f"{given} needs {missing}: the schedule of the answer, and what begins it",
            )
        return self

    def bounds(self) -> tuple[float, float]:
        lows, highs = zip(*(part.bounds() for part in self.phases()), strict=True)
        return min(lows), max(highs)

    def phases(self) -> tuple[Annealing, ...]:
        parts = (self.thinking,) if self.answer is None else (self.thinking, self.answer)
        return tuple(
            part if part.step is not None else part.model_copy(update={"step": self.step})
            for part in parts
        )

    def initial_state(self, generated: Sequence[int]) -> tuple[float, float, float]:
        origin = phase = 0
        ends, restarts = set(self.end_of_thinking_token_ids), set(self.restart_token_ids)
        first = self.position_offset - len(generated)
        for after, token_id in enumerate(generated, first + 1):  # t of the token after this one
            if phase:
                break
            if token_id in ends:
                origin, phase = after, 1
            elif token_id in restarts:
                origin = after
        return float(origin), float(phase), 0.0

    def resolved(self, tokenizer: Any) -> Segment:
        marks = {}
        for name in ("restart", "end_of_thinking"):
            ids, strings = getattr(self, f"{name}_token_ids"), getattr(self, f"{name}_strings")
            found = set(ids)
            for index, string in enumerate(strings):
                path = f"annealing.{name}_strings[{index}]"
                found |= _tokens_with(string, tokenizer, path)
            if len(found) > MAX_MARKS:
                raise AnnealingError(
                    f"annealing.{name}_strings",
                    f"must be in at most {MAX_MARKS} tokens of the vocabulary, got {len(found)}",
                )
            marks[f"{name}_token_ids"] = sorted(found)
        return self.model_copy(update=marks)


def _tokens_with(string: str, tokenizer: Any, path: str) -> frozenset[int]:
    """Ids of the tokens whose text contains `string`. Raises AnnealingError when none does."""
    if tokenizer is None:
        raise AnnealingError(path, "needs a tokenizer, which this server has not: give token ids")
    found = _vocabulary(tokenizer).tokens_with(string)
    if not found:
        ids = tokenizer.encode(string, add_special_tokens=False)
        raise AnnealingError(
            path,
            f"no single token of this model contains {shown(string)} (it is {len(ids)}: {ids})",
        )
    return found


class _Vocabulary:
    """The text of every token, alone. About a second to make for 150,000 tokens, once; then a
    search through all is one through a single string, in less than a millisecond."""

    def __init__(self, tokenizer: Any) -> None:
        texts: list[str] = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._text = _BETWEEN.join(texts)
        lengths = (len(text) + len(_BETWEEN) for text in texts)
        self._starts = list(accumulate(lengths, initial=0))
        # a method of this object's, so that what it remembers goes with it
        self.tokens_with = lru_cache(maxsize=1024)(self._tokens_with)

    def _tokens_with(self, string: str) -> frozenset[int]:
        """Their ids; of very many, the first MAX_MARKS and one more."""
        found: set[int] = set()
        at = self._text.find(string)
        while at >= 0 and len(found) <= MAX_MARKS:
            token_id = bisect_right(self._starts, at) - 1
            found.add(token_id)
            at = self._text.find(string, self._starts[token_id + 1])
        return frozenset(found)


# no part of a string that is looked for, see Segment._check_strings
_BETWEEN = "\0"


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> _Vocabulary:
    return _Vocabulary(tokenizer)


# --- sizing ------------------------------------------------------------------------------------


def suggest_schedule(
    answer_lengths: Sequence[int], *, tau_max: float = 1.2, tau_min: float = 0.1
) -> Ead:
    """EAD sized for answers of these lengths (tokens): the middle one anneals over its first half.

    The presets are sized for long mathematics; a short answer ends before they have cooled at
    all. Here the floor is reached at half the median length, so the first eighth or so is sampled
    above temperature 1, as the paper's rule of thumb has it. No growth with the step: ask again
    when the answers have grown. Raises ValueError without lengths.
    """
    lengths = [length for length in answer_lengths if length > 0]
    if not lengths:
        raise ValueError("answer_lengths must hold at least one positive length")
    floor_at = max(statistics.median(lengths) / 2, 1.0)
    # the floor is where exp(t / d) = 1 + tau_max - tau_min
    decay = floor_at / math.log(1 + tau_max - tau_min) if tau_max > tau_min else floor_at
    above_one = decay * math.log(tau_max) if tau_max > 1 else 0.0
    return Ead.model_validate(
        {
            "tau_max": tau_max,
            "tau_min": tau_min,
            "decay": decay,
            "decay_growth": 0.0,
            "decay_cap": decay,
            "warmup": min(10, int(above_one)),
        }
    )


def _ead(t: Tensor, tau_max: Tensor, tau_min: Tensor, decay: Tensor) -> Tensor:
    # 1 + tau_max - exp(x), without rounding above tau_max; infinite exponentials meet the floor
    return torch.maximum(tau_max - torch.expm1(t / decay), tau_min)
