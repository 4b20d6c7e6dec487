"""A schedule whose clock restarts at given tokens, and that changes after the end of thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, WithJsonSchema, field_validator, model_validator

from ead_sampler.errors import AnnealingError
from ead_sampler.schedules.base import (
    REGISTRY,
    Annealing,
    parse_annealing,
    register,
    short_repr,
)
from ead_sampler.schedules.vocabulary import BETWEEN, MAX_MARKS, tokens_with

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
            if BETWEEN in string:
                raise AnnealingError(path, f"must have no NUL character, got {short_repr(string)}")
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

    def marks(self) -> tuple[Sequence[int], Sequence[int]]:
        return self.restart_token_ids, self.end_of_thinking_token_ids

    def resolved(self, tokenizer: Any) -> Segment:
        marks = {}
        for name in ("restart", "end_of_thinking"):
            ids, strings = getattr(self, f"{name}_token_ids"), getattr(self, f"{name}_strings")
            found = set(ids)
            for index, string in enumerate(strings):
                path = f"annealing.{name}_strings[{index}]"
                found |= tokens_with(string, tokenizer, path)
            if len(found) > MAX_MARKS:
                raise AnnealingError(
                    f"annealing.{name}_strings",
                    f"must be in at most {MAX_MARKS} tokens of the vocabulary, got {len(found)}",
                )
            marks[f"{name}_token_ids"] = sorted(found)
        return self.model_copy(update=marks)
