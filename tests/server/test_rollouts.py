"""/v1/rollouts on a real server: every form of it, and what a trainer leans on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import zlib
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.reference import Reference
from helpers.rollout_calls import (
    LONG,
    answer_of,
    request_text,
    wait_until,
    wait_until_idle,
)
from helpers.serving import FAST, check_against_reference, expected_temperatures, post
from hypothesis import given, settings
from hypothesis import strategies as st

from ead_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    Group,
    MalformedAnswer,
    RequestRefused,
    Rollout,
    ScheduleIgnored,
)
from ead_client._rollouts import FRAMES, WHOLE, Frames, unpack
from ead_server.errors import TooManyJobs
from ead_server.launch.process import ServerProcess
from ead_server.rollouts import packing
from ead_server.rollouts.job import Group as RunningGroup
from ead_server.rollouts.job import Job
from ead_server.rollouts.kept_jobs import KeptJobs
from ead_server.rollouts.request import Prompt

MESSAGES = [{"role": "user", "content": "class Sampler"}]


def rollouts_of(group: Group) -> list[Rollout]:
    assert group.error is None
    found = [answer.rollout for answer in group.answers if answer.rollout is not None]
    assert len(found) == len(group.answers)
    return found


# --- what comes back ---------------------------------------------------------------------------


def test_every_form_of_prompt_gives_n_exact_answers(client: Client, reference: Reference) -> None:
    ids = reference.tokenizer("def temperatures")["input_ids"]
    prompts = [
        "def temperatures",
        ids,
        MESSAGES,
        {"token_ids": ids, "n": 3, "metadata": {"answer": "42", "nested": [1, None]}},
    ]
    answer = client.rollouts(
        prompts, n=2, annealing=FAST, entropies=True, max_new_tokens=20, ignore_eos=True
    )
    assert [group.index for group in answer.groups] == [0, 1, 2, 3]
    assert [len(group.answers) for group in answer.groups] == [2, 2, 2, 3]
    assert [group.metadata for group in answer.groups][2:] == [None, prompts[3]["metadata"]]
    template = reference.tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    assert answer.groups[2].prompt_token_ids.tolist() == template
    assert answer.groups[0].prompt_token_ids.tolist() == ids
    for group in answer.groups:
        for rollout in rollouts_of(group):
            assert len(rollout) == 20
            want = expected_temperatures(FAST, 20)
            assert np.abs(rollout.temperatures - want).max() < 1e-6
            check_against_reference(rollout, reference)
            assert rollout.sampling == {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
            assert rollout.finish_reason == "length"
    assert answer.usage["completion_tokens"] == 9 * 20
    assert answer.errors == []
    texts = [a.text for group in answer.groups for a in group.answers]
    assert len(set(texts)) == len(texts)  # independent samples


def test_all_forms_of_an_answer_say_the_same(server: ServerProcess) -> None:
    """The same kept job, written four ways, each also compressed."""
    body = {"prompts": ["def ", [5, 6, 7], [99_999]], "n": 3, "annealing": FAST}
    body["sampling_params"] = {"max_new_tokens": 12}
    headers = {"idempotency-key": "four-ways", **server.admin_headers}

    def get(accept: str) -> httpx.Response:
        answers = {}
        for encoding in ("gzip;q=0, identity", "br, gzip;q=0.5"):
            answers[encoding] = answer = httpx.post(
                f"{server.url}/v1/rollouts",
                json=body,
                headers={**headers, "accept": accept, "accept-encoding": encoding},
                timeout=60,
            )
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(accept)
            assert answer.headers["vary"].startswith("accept, accept-encoding")
        plain, compressed = answers.values()
        assert "content-encoding" not in plain.headers
        assert compressed.headers["content-encoding"] == "gzip"
        assert compressed.num_bytes_downloaded < plain.num_bytes_downloaded
        assert len(compressed.content) == len(plain.content)
        if accept in ("application/json", WHOLE):  # streams: in the order of completion
            assert compressed.content == plain.content
        return compressed

    whole = get("application/json").json()
    lines = [json.loads(line) for line in get("application/x-ndjson").text.splitlines()]
    about, groups = unpack(get(WHOLE).content)
    frames = [unpack(frame) for frame in Frames().feed(get(FRAMES).content)]

    assert lines[-1]["object"] == "rollouts.end"
    assert lines[-1]["id"] == whole["id"] == about["id"] == frames[-1][0]["id"]
    assert sorted(lines[:-1], key=lambda line: line["index"]) == whole["groups"]
    assert whole["usage"] == lines[-1]["usage"] == about["usage"]
    framed = sorted((g for _, some in frames for g in some), key=lambda g: g.index)
    for told, *others in zip(whole["groups"], groups, framed, strict=True):
        for other in others:
            assert other.prompt_token_ids.tolist() == told["prompt_token_ids"]
            assert other.error == told["error"]
            for want, got in zip(told["answers"], other.answers, strict=True):
                assert got.rollout is not None
                assert got.text == want["text"]
                assert got.rollout.annealing == told["annealing"]
                for name in ("token_ids", "temperatures", "logprobs", "model_logprobs"):
                    column = getattr(got.rollout, name)
                    assert np.array_equal(column, np.asarray(want[name], column.dtype))


def test_texts_can_be_left_out(client: Client) -> None:
    both = [
        client.rollouts(
            ["class"],
            annealing=FAST,
            texts=texts,
            max_new_tokens=8,
            ignore_eos=True,
            sampling_seed=5,
        )
        for texts in (True, False)
    ]
    (with_text,), (without,) = (answer.groups[0].answers for answer in both)
    assert (bool(with_text.text), without.text) == (True, "")
    assert without.rollout is not None
    assert len(without.rollout) == 8


def test_one_prompts_failure_is_its_own(client: Client) -> None:
    unknown = [[-1], [5, 99_999], [2**40], {"text": "x", "prefix_token_ids": [2**63]}]
    prompts = ["x", [5] * 5000, *unknown]
    answer = client.rollouts(prompts, n=2, annealing={}, max_new_tokens=3)
    assert len(rollouts_of(answer.groups[0])) == 2
    errors = [group.error or {} for group in answer.groups[1:]]
    assert {error["type"] for error in errors} == {"invalid_request_error"}
    assert "longer than the model's context length" in errors[0]["message"]
    assert [error["param"] for error in errors[1:]] == ["input_ids"] * 4
    assert len(answer.errors) == 5


def test_an_answer_is_continued_from_a_token(client: Client, reference: Reference) -> None:
    """The clock goes on where the prefix ends, unless the request says otherwise."""
    (first,) = rollouts_of(
        client.rollouts(["def "], annealing=FAST, max_new_tokens=12, ignore_eos=True).groups[0]
    )
    prefix = first.token_ids[:7].tolist()
    prompt = {"text": "def ", "prefix_token_ids": prefix}
    for schedule, offset in ((FAST, 7), ({**FAST, "position_offset": 2}, 2)):
        group = client.rollouts(
            [prompt, "def "], n=2, annealing=schedule, max_new_tokens=5, ignore_eos=True
        ).groups[0]
        assert group.prompt_token_ids.tolist() == [*first.prompt_token_ids.tolist(), *prefix]
        for rollout in rollouts_of(group):
            assert rollout.annealing is not None
            assert rollout.annealing["position_offset"] == offset
            want = expected_temperatures({**FAST, "position_offset": offset}, 5)
            assert np.abs(rollout.temperatures - want).max() < 1e-6
            check_against_reference(rollout, reference)


@pytest.mark.parametrize("cut", [0, 1, 4, 6, 8])
@pytest.mark.parametrize("how", [{"stop": ["\nUser:"]}, {"stop_regex": [r"\n[A-Z]ser:"]}])
def test_a_stop_that_begins_before_a_continuation_ends_it(
    cut: int, how: dict[str, Any], client: Client
) -> None:
    """Case 08: wherever the answer was cut, both parts together are the uninterrupted one."""
    said = "one\nUser: two"
    asked = {**how, "annealing": {}, "max_new_tokens": 40}
    (whole,) = client.rollouts(["Q:"], regex=said, **asked).groups[0].answers
    assert whole.finish_reason == "stop"
    assert whole.rollout is not None
    begun = {"model": "m", "prompt": said[:cut], "add_special_tokens": False}
    prefix = client.request("POST", "/tokenize", begun).json()["tokens"] if cut else []
    (rest,) = (
        client.rollouts([{"text": "Q:", "prefix_token_ids": prefix}], regex=said[cut:], **asked)
        .groups[0]
        .answers
    )
    assert rest.finish_reason == "stop"
    assert rest.rollout is not None
    ids = {"model": "m", "tokens": [*prefix, *rest.rollout.token_ids.tolist()]}
    text = client.request("POST", "/detokenize", ids).json()["text"]
    assert text == "one\nUser:"


def test_without_a_schedule_the_request_s_own_temperature_holds(client: Client) -> None:
    group = client.rollouts(["x"], n=2, temperature=0.5, top_k=4, max_new_tokens=6).groups[0]
    for rollout in rollouts_of(group):
        assert set(rollout.temperatures.tolist()) == {0.5}
        assert rollout.annealing is None
        assert rollout.sampling is not None
        assert rollout.sampling["top_k"] == 4


def test_answers_never_share_a_seed(client: Client) -> None:
    """The request's is the first answer's; the others count up, group by group."""
    asked = {"annealing": FAST, "max_new_tokens": 12, "ignore_eos": True}
    together = client.rollouts(["x", "x"], n=2, sampling_seed=5, **asked)
    ids = [r.token_ids.tolist() for group in together.groups for r in rollouts_of(group)]
    assert len({tuple(answer) for answer in ids}) == 4
    for number, answer in enumerate(ids):
        alone = client.rollouts(["x"], sampling_seed=5 + number, **asked)
        assert rollouts_of(alone.groups[0])[0].token_ids.tolist() == answer
    assert together.groups[1].answers[0].rollout.sampling["seed"] == 7


@pytest.mark.parametrize("compress", [False, True], ids=["as they are", "compressed"])
def test_groups_arrive_as_they_complete(client: Client, compress: bool) -> None:
    """A short prompt's group is there while a long one is still generated."""
    prompts = [{"text": "a", "n": 1}, {"text": "b", "n": 1}]
    with Client(client.base_url, compress=compress) as asking:
        # the first can stop only at its limit; the second stops at its first token
        stream = asking.stream_rollouts(
            [{**prompts[0], "metadata": "long"}, {"token_ids": [5] * 5000, "metadata": "fails"}],
            annealing={},
            **LONG,
        )
        assert next(stream).metadata == "fails"
        wait_until(client, lambda count: count > 0)
        stream.close()
    wait_until_idle(client)

    async def both() -> list[Any]:
        async with AsyncClient(client.base_url, compress=compress) as other:
            call = other.stream_rollouts(prompts, annealing=FAST, max_new_tokens=4)
            return [group.index async for group in call]

    assert sorted(asyncio.run(both())) == [0, 1]


# --- cancelling and retrying -------------------------------------------------------------------


def ask_and_leave(client: Client, text: bytes, answers: int) -> None:
    """Close the connection when so many answers are being generated."""
    url = httpx.URL(client.base_url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(text)
        wait_until(client, lambda count: count == answers)


@pytest.mark.parametrize("accept", ["application/json", WHOLE, FRAMES, "application/x-ndjson"])
def test_a_client_that_leaves_frees_the_engine(client: Client, accept: str) -> None:
    """At once, and before a neighbour with half as many tokens is done."""
    body = {"prompts": ["def ", "class "], "n": 4, "annealing": {}, "sampling_params": LONG}
    with ThreadPoolExecutor(1) as pool:
        params = {**LONG, "max_new_tokens": LONG["max_new_tokens"] // 2}
        stays = pool.submit(client.rollouts, ["def "], annealing={}, **params)
        wait_until(client, lambda count: count == 1)
        text = request_text(client, "/v1/rollouts", body, accept=accept)
        ask_and_leave(client, text, answers=9)
        wait_until(client, lambda count: count == 1)
        assert not stays.done()
        assert stays.result(timeout=60).groups[0].answers[0].finish_reason == "length"


def test_a_call_made_again_finds_the_work_of_the_first(
    server: ServerProcess, client: Client
) -> None:
    """The first one's connection is lost while it runs; nothing is generated twice."""

    def tokens() -> float:
        text = client.request("GET", "/metrics").text
        line = re.search(r'^ead_tokens_total\{schedule="ead"\} (\S+)', text, re.MULTILINE)
        return float(line[1]) if line else 0.0

    before = tokens()
    body = {"prompts": ["def "], "n": 2, "annealing": {}}
    body["sampling_params"] = {"max_new_tokens": 1000, "ignore_eos": True}
    headers = {"idempotency-key": "again"}
    ask_and_leave(client, request_text(client, "/v1/rollouts", body, **headers), answers=2)
    answers = [
        httpx.post(f"{server.url}/v1/rollouts", json=body, headers=headers, timeout=60).json()
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert answers[0]["usage"]["completion_tokens"] == 2000
    assert tokens() - before == 2000
    wait_until_idle(client)

    other = {**body, "n": 3}
    refused = httpx.post(f"{server.url}/v1/rollouts", json=other, headers=headers, timeout=60)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "Idempotency-Key"


def test_more_keys_than_are_kept_end_no_work() -> None:
    """The oldest finished jobs go; one that still runs stays and can be found again."""

    class Waits(RunningGroup):
        async def run(self, engine: Any) -> RunningGroup:
            await asyncio.Event().wait()
            return self

    async def fill() -> None:
        kept = KeptJobs(max_jobs=2)
        prompt = Prompt(text="x")
        runs = Job([Waits(0, prompt, 1, {})], None, "m")  # type: ignore[arg-type]
        kept.keep("runs", b"", runs)
        for index in range(4):
            kept.keep(f"done-{index}", b"", Job([], None, "m"))  # type: ignore[arg-type]
        assert kept.find("runs", b"") is runs
        assert not runs.done
        found = [kept.find(f"done-{index}", b"") is not None for index in range(4)]
        assert found == [False, False, False, True]
        other = Job([Waits(0, prompt, 1, {})], None, "m")  # type: ignore[arg-type]
        kept.keep("other", b"", other)
        with pytest.raises(TooManyJobs, match="2 jobs"):
            kept.find("one more", b"")
        assert kept.find("runs", b"") is runs
        runs.cancel()
        other.cancel()

    asyncio.run(fill())


def test_the_client_retries_with_a_key_and_not_without() -> None:
    calls: list[httpx.Request] = []

    def lose_two(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        if len(calls) < 3:
            raise httpx.ReadError("lost")
        head = {"id": "r", "model": "m", "usage": {}}
        return httpx.Response(200, content=packing.pack([], head))

    client = Client("http://x", transport=httpx.MockTransport(lose_two))
    client._wait_before = lambda attempt, clock: 0.0  # type: ignore[method-assign]
    with pytest.raises(ConnectionFailed):
        client.rollouts(["x"])
    calls.clear()
    assert client.rollouts(["x"], idempotency_key="k").groups == []
    assert {call.headers["idempotency-key"] for call in calls} == {"k"}


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompts", "Field required"),
        ({"prompts": []}, "prompts", "at least 1 item"),
        ({"prompts": ["x"], "n": 0}, "n", "greater than or equal to 1, got 0"),
        ({"prompts": ["x"], "n": 129}, "n", "must be an integer in [1, 128], got 129"),
        ({"prompts": [{"text": "x", "n": 999}]}, "prompts.0.n", "in [1, 128], got 999"),
        ({"prompts": ["x"] * 64, "n": 128}, "prompts", "at most 4096 answers in all, got 8192"),
        ({"prompts": [{}]}, "prompts.0", "exactly one of text, messages and token_ids"),
        ({"prompts": [{"text": "x", "extra": 1}]}, "prompts.0.extra", "not permitted"),
        ({"prompts": ["x"], "annealing": {"tau_max": 1e9}}, "annealing.tau_max", "[0.01, 10.0]"),
        ({"prompts": ["x"], "sampling_params": {"n": 2}}, "sampling_params.n", "own field `n`"),
        ({"prompts": ["x"], "sampling_params": {"q": 2}}, "sampling_params.q", "unknown field"),
        (
            {"prompts": ["x"], "sampling_params": {"top_k": "5"}},
            "sampling_params.top_k",
            "invalid type",
        ),
        *(
            (
                {"prompts": ["x"], "sampling_params": {name: value}},
                f"sampling_params.{name}",
                "unknown field",
            )
            for name, value in (("annealing", "x"), ("annealing", {}), ("rollout", True))
        ),
        ({"prompts": ["x"], "n": "2"}, "n", "valid integer, got '2'"),
        ({"prompts": ["x"], "n": True}, "n", "valid integer, got True"),
        (
            {"prompts": ["x"], "sampling_params": {"sampling_seed": "7"}},
            "sampling_params.sampling_seed",
            "must be an integer in [-4611686018427387904, 4611686018427387904], got '7'",
        ),
        (
            {"prompts": ["x"], "annealing": {}, "sampling_params": {"temperature": 0.5}},
            "temperature",
            "must be absent or 1",
        ),
        ([], "body", "valid dictionary"),
    ],
)
def test_a_bad_request_names_field_and_range(
    server: ServerProcess, body: Any, param: str, says: str
) -> None:
    answer = httpx.post(f"{server.url}/v1/rollouts", json=body, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_the_client_raises_what_the_server_refuses_and_what_it_ignores(client: Client) -> None:
    with pytest.raises(RequestRefused, match="tau_max"):
        client.rollouts(["x"], annealing={"tau_max": 99})
    group = RunningGroup(0, Prompt(text="x"), 1, {})
    group.answers = [answer_of([1, 2], 0.5)]  # a server that knows nothing of schedules
    head = {"id": "r", "model": "m", "usage": {}}
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, content=packing.pack([group], head))
    )
    with pytest.raises(ScheduleIgnored):
        Client("http://x", transport=transport).rollouts(["x"], annealing={})


# --- the binary form ---------------------------------------------------------------------------


ANSWERS = st.lists(
    st.one_of(
        st.just({"error": {"message": "m", "type": "server_error", "param": None, "code": 500}}),
        st.builds(
            answer_of,
            st.lists(st.integers(0, 2**24 - 1), max_size=5),
            st.sampled_from([0.1, 0.5, 1.0]),
        ),
    ),
    max_size=6,
)


@given(groups=st.lists(st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=4), ANSWERS)))
@settings(max_examples=200)
def test_what_is_packed_is_unpacked(groups: list[tuple[list[int], list[dict[str, Any]]]]) -> None:
    """Bit by bit, with failed answers, empty ones and shared runs of temperatures."""
    made = []
    for index, (prompt, answers) in enumerate(groups):
        group = RunningGroup(index, Prompt(text="x", metadata=[index]), 1, {})
        group.prompt_token_ids = np.asarray(prompt, np.int32)
        group.answers = answers
        made.append(group)
    about, found = unpack(packing.pack(made, {"id": "r"}))
    assert about == {"id": "r"}
    for group, got in zip(made, found, strict=True):
        assert got.metadata == [group.index]
        assert np.array_equal(got.prompt_token_ids, group.prompt_token_ids)
        for want, answer in zip(group.answers, got.answers, strict=True):
            assert answer.error == want["error"]
            if want["error"] is None:
                assert answer.rollout is not None
                for name in ("token_ids", "temperatures", "logprobs", "model_logprobs"):
                    assert np.array_equal(getattr(answer.rollout, name), want[name])


def test_each_part_of_a_compressed_stream_can_be_read_when_it_arrives() -> None:
    parts = [b"first", b"", bytes(range(256)) * 1000, b"last"]

    async def generate() -> AsyncGenerator[bytes, None]:
        for part in parts:
            yield part

    async def read() -> list[bytes]:
        reader = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        pieces = packing.compressed_parts(generate())
        read = [reader.decompress(piece) async for piece in pieces]
        assert reader.eof
        return read

    assert asyncio.run(read()) == [*parts, b""]


def test_the_arrays_of_an_answer_are_views_of_its_bytes() -> None:
    group = RunningGroup(0, Prompt(text="x"), 1, {})
    group.answers = [answer_of([100_000, 5], 0.5)]
    _, (got,) = unpack(packing.pack([group], {}))
    rollout = got.answers[0].rollout
    assert rollout is not None
    for name in ("temperatures", "logprobs", "model_logprobs"):
        assert not getattr(rollout, name).flags.owndata


@given(data=st.data())
@settings(max_examples=200)
def test_damaged_bytes_are_a_typed_error(data: st.DataObject) -> None:
    """Cut short or with a byte changed: MalformedAnswer, or numbers that differ; nothing else."""
    group = RunningGroup(0, Prompt(text="x"), 1, {})
    group.answers = [answer_of([1, 2, 100_000], 0.5)]
    whole = bytearray(packing.pack([group], {}))
    cut = data.draw(st.integers(0, len(whole)))
    if data.draw(st.booleans()):
        whole = whole[:cut]
    elif cut < len(whole):
        whole[cut] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MalformedAnswer):
        unpack(bytes(whole))


def test_frames_are_cut_however_the_bytes_arrive() -> None:
    stream = b"".join(len(f).to_bytes(8, "little") + f for f in (b"one", b"", b"three"))
    frames = Frames()
    found = [frame for i in range(len(stream)) for frame in frames.feed(stream[i : i + 1])]
    assert found == [b"one", b"", b"three"]


# --- the other routes ---------------------------------------------------------------------------


def test_the_default_schedule_is_read_and_set(server: ServerProcess) -> None:
    def put(body: Any) -> httpx.Response:
        url = f"{server.url}/v1/annealing"
        return httpx.put(url, json=body, headers=server.admin_headers, timeout=30)

    prompt: dict[str, Any] = {"prompts": ["x"], "sampling_params": {"max_new_tokens": 3}}
    native = {"text": "x", "sampling_params": {"max_new_tokens": 3}}
    try:
        told = put({"annealing": {"schedule": "constant", "tau": 0.5}, "step": 4}).json()
        assert told == httpx.get(f"{server.url}/v1/annealing", timeout=30).json()
        assert told["annealing"] == {"schedule": "constant", "tau": 0.5}
        assert told["step"]["step"] == 4
        group = post(server, "/v1/rollouts", prompt)["groups"][0]
        assert group["answers"][0]["temperatures"] == [0.5] * 3
        assert group["annealing"]["step"] == 4
        assert post(server, "/generate", native)["meta_info"]["annealing"]["tau"] == 0.5
        group = post(server, "/v1/rollouts", {**prompt, "annealing": None})["groups"][0]
        assert group["answers"][0]["temperatures"] == [1.0] * 3
        for choice, taus in (  # as on the other routes: what is no choice keeps the default
            ({"temperature": 1}, [0.5] * 3),
            ({"temperature": 0.7}, [pytest.approx(0.7)] * 3),
            ({"top_k": 1}, [0.0] * 3),
        ):
            params = {**prompt["sampling_params"], **choice, "ignore_eos": True}
            body = {**prompt, "sampling_params": params}
            group = post(server, "/v1/rollouts", body)["groups"][0]
            assert group["answers"][0]["temperatures"] == taus
        refused = put({"annealing": {"schedule": "constant", "tau": 50}})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "annealing.tau"
        assert httpx.get(f"{server.url}/v1/annealing", timeout=30).json() == told
    finally:
        assert put({"annealing": None, "step": None}).json()["annealing"] is None
    assert "annealing" not in post(server, "/generate", native)["meta_info"]


def test_a_preview_is_numbers_or_a_plot(server: ServerProcess) -> None:
    from xml.etree import ElementTree

    query: dict[str, Any] = {"annealing": json.dumps({"decay": 9.0, "warmup": 2}), "length": 40}
    url = f"{server.url}/v1/annealing/preview"
    got = httpx.get(url, params={**query, "step": [0, 8]}, timeout=30).json()
    assert list(got["temperatures"]) == ["0", "8"]
    for step, values in got["temperatures"].items():
        schedule = {"decay": 9.0, "warmup": 2, "step": int(step)}
        assert values == pytest.approx(expected_temperatures(schedule, 40), abs=1e-9)
    plot = httpx.get(url, params=query, headers={"accept": "image/svg+xml"}, timeout=30)
    assert plot.headers["content-type"].startswith("image/svg+xml")
    lines = ElementTree.fromstring(plot.text).findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 1
    heights = [float(point.split(",")[1]) for point in lines[0].attrib["points"].split()]
    assert len(heights) == 40
    assert heights[-1] > heights[2]  # cooler is lower on the page
    for bad in ({"annealing": "{"}, {"length": 0}, {"step": -1}, {"entropy": "nan"}):
        answer = httpx.get(url, params={**query, **bad}, timeout=30)
        assert answer.status_code == 400, bad
        assert answer.json()["error"]["param"].startswith(next(iter(bad)))


def test_the_description_of_the_api_has_what_is_ours(server: ServerProcess) -> None:
    described = httpx.get(f"{server.url}/openapi.json", timeout=30).json()
    for path in ("/v1/rollouts", "/v1/annealing", "/v1/annealing/preview", "/v1/annealing/schema"):
        assert path in described["paths"]
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        assert {"annealing", "rollout"} <= set(
            described["components"]["schemas"][name]["properties"]
        )
    schemas = httpx.get(f"{server.url}/v1/annealing/schema", timeout=30).json()["schedules"]
    assert {"ead", "segment", "piecewise"} <= set(schemas)
    assert schemas["ead"]["properties"]["tau_max"]["maximum"] == 10.0
    for state in ("live", "ready"):
        assert httpx.get(f"{server.url}/health/{state}", timeout=30).status_code == 200
