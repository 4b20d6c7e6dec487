"""Which tokens of a vocabulary contain a string."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import Any

from ead_sampler.errors import AnnealingError
from ead_sampler.schedules.base import short_repr

MAX_MARKS = 1024  # token ids that may restart a clock
BETWEEN = "\0"  # no part of a string that is looked for


def tokens_with(string: str, tokenizer: Any, path: str) -> frozenset[int]:
    """Ids of the tokens whose text contains `string`. Raises AnnealingError when none does."""
    if tokenizer is None:
        raise AnnealingError(path, "needs a tokenizer, which this server has not: give token ids")
    found = _vocabulary(tokenizer).tokens_with(string)
    if not found:
        ids = tokenizer.encode(string, add_special_tokens=False)
        raise AnnealingError(
            path,
            f"no single token of this model contains {short_repr(string)} "
            f"(it is {len(ids)}: {ids})",
        )
    return found


class _Vocabulary:
    """The text of every token, alone. About a second to make for 150,000 tokens, once; then a
    search through all is one through a single string, in less than a millisecond."""

    def __init__(self, tokenizer: Any) -> None:
        texts: list[str] = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self._text = BETWEEN.join(texts)
        lengths = (len(text) + len(BETWEEN) for text in texts)
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


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> _Vocabulary:
    return _Vocabulary(tokenizer)
