"""From what the engine delivers to the `rollout` objects of an answer.

A Recorder belongs to one HTTP request. It sees every item of TokenizerManager.generate_request
(`ead_sampler.in_tokenizer`) before SGLang turns that item into the bytes of an answer, so at any
moment of a stream it knows exactly the tokens that the answer has reached.
"""

from __future__ import annotations

from typing import Any

from ead_sampler.names import ANNEALING, COLUMNS, ENTROPIES, MARKERS
from ead_server.json_types import Json

_RECORDED = (*COLUMNS, ENTROPIES)


class Answer:
    """One answer being generated: its columns so far, and how much of them was handed out."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in ("token_ids", *COLUMNS)}
        self.meta: Json = {}
        self.prompt_token_ids: list[int] | None = None
        self.length = 0  # tokens
        self.handed_out = 0  # tokens

    @property
    def recorded(self) -> bool:
        """Whether the sampler recorded this answer, that is, honoured the request."""
        return len(self.columns[COLUMNS[0]]) >= self.length

    def rest(self, *, last: bool) -> Json:
        """The columns that were not handed out yet; the last time with all that is said of them."""
        start, self.handed_out = self.handed_out, self.length
        rest: Json = {name: values[start : self.length] for name, values in self.columns.items()}
        if last:
            return {**rest, **answer_facts(self.meta), "prompt_token_ids": self.prompt_token_ids}
        return rest if start else {**rest, ANNEALING: self.meta.get(ANNEALING)}

    def enrich_logprobs(self, logprobs: Any) -> None:
        """Add temperature and model_logprob to OpenAI's `logprobs`, in place.

        Its entries are the last ones of the tokens so far: SGLang drops those of stream chunks
        without text, and puts a prompt's (with echo) before the first.
        """
        if not isinstance(logprobs, dict):
            return
        entries = logprobs.get("content")  # chat's, one each; completions have columns
        count = len(entries or logprobs.get("tokens") or ())
        temperatures = self._last_values("temperatures", count)
        model_logprobs = self._last_values("model_logprobs", count)
        if entries:
            values = zip(temperatures, model_logprobs, strict=True)
            for entry, (temperature, logprob) in zip(entries, values, strict=True):
                entry["temperature"], entry["model_logprob"] = temperature, logprob
        elif count:
            logprobs["temperatures"], logprobs["model_logprobs"] = temperatures, model_logprobs

    def _last_values(self, name: str, count: int) -> list[float | None]:
        """One column's values of the last `count` tokens; None for a prompt's."""
        values = self.columns[name][max(0, self.length - count) : self.length]
        return [None] * (count - len(values)) + values


class Recorder:
    """What the engine delivered for one HTTP request, by choice index."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}

    def observe(self, index: int, item: Json) -> None:
        """Take in one item: all tokens so far, or only the new ones, as SGLang is configured."""
        answer = self.answers.get(index)
        if answer is None:
            answer = self.answers[index] = Answer()
        meta, token_ids = item["meta_info"], item.get("output_ids") or []
        total = meta["completion_tokens"]
        new = {"token_ids": token_ids, **{name: meta[name] for name in _RECORDED if name in meta}}
        if total > len(token_ids):
            for name, values in new.items():
                answer.columns.setdefault(name, []).extend(values)
        elif answer.length:
            answer.columns |= new  # SGLang's own lists, which grow on
        else:  # copies, since incremental items may follow and extend them
            answer.columns |= {name: list(values) for name, values in new.items()}
        answer.length, answer.meta = total, meta
        if item.get("prompt_token_ids") is not None:
            answer.prompt_token_ids = list(item["prompt_token_ids"])

    def enrich(self, choice: Json) -> None:
        """Add what was recorded to one choice of a whole OpenAI answer, in place."""
        answer = self.answers.get(choice["index"])
        if answer is not None and answer.recorded:
            answer.enrich_logprobs(choice.get("logprobs"))
            choice["rollout"] = answer.rest(last=True)

    def enrich_chunk(self, choice: Json) -> None:
        """Add what no chunk has carried yet to one choice of a stream's chunk, in place.

        Not to a chunk without text: some clients (litellm) drop these, and what is in them.
        """
        answer = self.answers.get(choice["index"])
        if answer is None or not answer.recorded:
            return
        answer.enrich_logprobs(choice.get("logprobs"))
        last = choice.get("finish_reason") is not None
        if last or (answer.handed_out < answer.length and _has_text(choice)):
            choice["rollout"] = answer.rest(last=last)


def _has_text(choice: Json) -> bool:
    """Whether a chunk brings text, reasoning or a call of a tool, and not the role alone."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text"))
    return any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))


def answer_facts(meta: Json) -> Json:
    """What an answer's meta_info says besides its columns: markers, ending, weight versions."""
    reason = meta.get("finish_reason")
    return {
        **{name: meta.get(name) for name in MARKERS},
        "finish_reason": reason.get("type") if isinstance(reason, dict) else reason,
        "weight_version": meta.get("weight_version"),
        "weight_versions": meta.get("weight_versions"),
    }
