"""What travels to the scheduler fits SGLang's messages, pickled or not (SGLANG_USE_PICKLE_IPC)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from helpers.reference import TINY_FLAGS

from ead_sampler import FieldError, parse_annealing
from ead_sampler.in_tokenizer import generate
from ead_sampler.in_tokenizer.fields import sent_schedule
from ead_server.launch.process import ServerProcess

KINDS: list[dict[str, Any]] = [
    {"schedule": "ead", "step": 0},
    {"schedule": "piecewise", "knots": [[0, 1.2], [10, 0.6], [20, 1.0]], "step": 0},
    {
        "schedule": "segment",
        "thinking": {"schedule": "linear", "length": 20.0},
        "answer": {"schedule": "piecewise", "knots": [[0, 1.0], [9, 0.5]]},
        "end_of_thinking_token_ids": [9],
        "step": 0,
    },
    {"schedule": "ead", "mean_matched": {"tokens": 100, "temperature": 1.0}, "step": 0},
]
NESTED: list[Any] = [{"l": [[1]]}, {"a": {"b": {"c": 1}}}, {"big": 10**30}, {"a": {"b": [1]}}]


def verified(monkeypatch: pytest.MonkeyPatch, custom: Any) -> Any:
    """Custom parameters as they go to the scheduler."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    monkeypatch.setattr(generate, "check_server_mode", lambda asked: None)
    params = SamplingParams(custom_params=custom)
    generate.verify_sampling_params(None, params, 1024)
    return params


@pytest.mark.parametrize("raw", KINDS, ids=lambda raw: str(sorted(raw)))
def test_every_kind_fits_sglang_s_own_decoder(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = verified(monkeypatch, {"annealing": raw, "rollout": {"entropies": True}, "x": 1})
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert parse_annealing(sent_schedule(again.custom_params)) == parse_annealing(raw)
    assert again.custom_params["rollout"] == {"entropies": True}
    assert again.custom_params["x"] == 1


@pytest.mark.parametrize("custom", NESTED, ids=str)
def test_what_does_not_fit_is_refused_where_it_would_kill_the_scheduler(
    custom: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified(monkeypatch, custom)
    monkeypatch.setenv("SGLANG_USE_PICKLE_IPC", "0")
    verified(monkeypatch, {"a": [1, "x", None], "b": {"c": 1.5}})
    with pytest.raises(FieldError, match="custom_params: must be numbers, strings"):
        verified(monkeypatch, custom)


def test_a_schedule_that_is_a_string_but_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "ead", "[" * 100_000, "1", '"x"'):
        with pytest.raises(FieldError, match="annealing"):
            verified(monkeypatch, {"annealing": text})


@pytest.fixture(scope="module")
def without_pickle(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("messages") / "server.log"
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS]
    with ServerProcess(arguments, log, environ={"SGLANG_USE_PICKLE_IPC": "0"}) as process:
        process.wait_until_ready()
        yield process


def test_all_of_it_on_a_server_without_pickle(without_pickle: ServerProcess) -> None:
    post: Callable[..., httpx.Response] = lambda **params: httpx.post(  # noqa: E731
        f"{without_pickle.url}/generate",
        json={"text": "x", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True, **params}},
        timeout=60,
    )
    for raw in KINDS:
        answer = post(annealing=raw)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["meta_info"]["temperatures"]) == 4
        assert answer.json()["meta_info"]["annealing"]["schedule"] == raw["schedule"]
    for custom in NESTED[:2]:
        assert post(custom_params=custom).status_code == 400
    assert post().status_code == 200
