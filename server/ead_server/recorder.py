"""From what the engine delivers to the `rollout` objects of an answer.

A Recorder belongs to one HTTP request. It sees every item of TokenizerManager.generate_request
(`ead_sampler.requests`) before SGLang turns that item into the bytes of an answer, so at any
moment of a stream it knows exactly the tokens that the answer has reached.
"""

from __future__ import annotations

from typing import Any

from ead_sampler.requests import COLUMNS, ENTROPIES, MARKERS

Json = dict[str, Any]


class Choice:
    """One answer being generated: its columns so far, and how much of them was handed out."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self.meta: Json = {}
        self.prompt_token_ids: list[int] | None = None
        self.length = 0  # tokens
        self.handed_out = 0  # tokens

    @property
    def recorded(self) -> bool:
        """Whether the sampler recorded this answer, that is, honoured the request."""
        return len(self.columns.get(COLUMNS[0], ())) >= self.length

    def column(self, name: str, start: int = 0) -> list[Any]:
        return self.columns.get(name, [])[start : self.length]

    def last_values(self, count: int) -> list[tuple[float | None, float | None]]:
        """(temperature, model_logprob) of the last `count` tokens; None for a prompt's."""
        start = max(0, self.length - count)
        temperatures = self.column("temperatures", start)
        generated = zip(temperatures, self.column("model_logprobs", start), strict=True)
        return [(None, None)] * (count - len(temperatures)) + list(generated)


class Recorder:
    """What the engine delivered for one HTTP request, by choice index."""

    def __init__(self) -> None:
        self.choices: dict[int, Choice] = {}

    def observe(self, item: Json) -> None:
        """Take in one item: all tokens so far, or only the new ones, as SGLang is configured."""
        choice = self.choices.setdefault(item["index"], Choice())
        meta = item["meta_info"]
        total = meta["completion_tokens"]
        new = {"token_ids": item.get("output_ids") or []}
        new.update((name, meta[name]) for name in (*COLUMNS, ENTROPIES) if name in meta)
        incremental = total > len(new["token_ids"])
        for name, values in new.items():
            if incremental:
                choice.columns.setdefault(name, []).extend(values)
            else:  # a copy of the first, since incremental items may follow and extend it;
                # then SGLang's own list, which grows on
                choice.columns[name] = values if choice.length else list(values)
        choice.length, choice.meta = total, meta
        if item.get("prompt_token_ids") is not None:
            choice.prompt_token_ids = list(item["prompt_token_ids"])

    def rollout(self, index: int) -> Json | None:
        """The whole answer `index`: columns, markers, prompt and weight versions."""
        choice = self.choices.get(index)
        if choice is None or not choice.recorded:
            return None
        return {**_columns(choice, 0), **_about(choice)}

    def rollout_chunk(self, index: int, *, last: bool) -> Json | None:
        """The columns that no chunk of `index` has carried yet; the last one tells the rest."""
        choice = self.choices.get(index)
        if choice is None or not choice.recorded:
            return None
        first = choice.handed_out == 0
        if choice.handed_out == choice.length and not last:
            return None
        chunk = _columns(choice, choice.handed_out)
        choice.handed_out = choice.length
        if last:
            return {**chunk, **_about(choice)}
        return {**chunk, "annealing": choice.meta.get("annealing")} if first else chunk

    def enrich_logprobs(self, index: int, logprobs: Any) -> None:
        """Add temperature and model_logprob to OpenAI's `logprobs` of one choice, in place.

        Its entries are the last ones of the tokens so far: SGLang drops those of stream chunks
        without text, and puts a prompt's (with echo) before the first.
        """
        choice = self.choices.get(index)
        if choice is None or not choice.recorded or not isinstance(logprobs, dict):
            return
        if logprobs.get("content"):  # chat: a list of entries
            values = choice.last_values(len(logprobs["content"]))
            for entry, (temperature, logprob) in zip(logprobs["content"], values, strict=True):
                entry["temperature"], entry["model_logprob"] = temperature, logprob
        elif logprobs.get("tokens"):  # completions: columns
            values = choice.last_values(len(logprobs["tokens"]))
            logprobs["temperatures"] = [temperature for temperature, _ in values]
            logprobs["model_logprobs"] = [logprob for _, logprob in values]


def _columns(choice: Choice, start: int) -> Json:
    names = ("token_ids", *COLUMNS, *([ENTROPIES] if ENTROPIES in choice.columns else []))
    return {name: choice.column(name, start) for name in names}


def _about(choice: Choice) -> Json:
    return {**said_of(choice.meta), "prompt_token_ids": choice.prompt_token_ids}


def said_of(meta: Json) -> Json:
    """What an answer's meta_info says besides its columns: markers, ending, weight versions."""
    reason = meta.get("finish_reason")
    return {
        **{name: meta.get(name) for name in MARKERS},
        "finish_reason": reason.get("type") if isinstance(reason, dict) else reason,
        "weight_version": meta.get("weight_version"),
        "weight_versions": meta.get("weight_versions"),
    }
