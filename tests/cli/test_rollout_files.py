"""`ead rollout` on odd files and odd servers: nothing is lost, changed or touched. No server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner, Result

import ead_cli.rollout
import ead_client
from ead_cli.main import app
from ead_client._rollouts import FRAMES

Json = dict[str, Any]


def packed(about: Json, answers: int = 0) -> bytes:
    """A frame with `answers` answers of one token each."""
    zeros = np.zeros(answers, np.float32)
    arrays: dict[str, Any] = {
        "token_ids": np.full(answers, 5, np.uint16),
        "offsets": np.arange(answers + 1, dtype=np.int64),
        "logprobs": zeros,
        "model_logprobs": zeros,
        "temperatures": zeros + 1,
        "temperature_starts": np.arange(answers, dtype=np.int64),
        "prompt_token_ids": np.array([1, 2], np.int32),
        "prompt_offsets": np.array([0, 2], np.int64),
        "json": np.frombuffer(json.dumps({"groups": [], **about}).encode(), np.uint8),
    }
    data = save(arrays)
    return len(data).to_bytes(8, "little") + data


class Served:
    """What /v1/rollouts is asked for, and answers as `answer` says: a finish reason or an error."""

    def __init__(self) -> None:
        self.info: Json = {"model_path": "/models/a", "weight_version": "1"}
        self.bodies: list[Json] = []
        self.answer: Callable[[Json], str | Json] = lambda prompt: "stop"
        self.refuse: Callable[[Json], Json | None] = lambda body: None

    @property
    def texts(self) -> list[str]:
        return [prompt["text"] for body in self.bodies for prompt in body["prompts"]]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/model_info":
            return httpx.Response(200, json=self.info)
        assert request.headers["accept"] == FRAMES
        body = json.loads(request.content)
        self.bodies.append(body)
        if (refused := self.refuse(body)) is not None:
            return httpx.Response(400, json={"error": refused})
        frames = [self._group(i, prompt, body) for i, prompt in enumerate(body["prompts"])]
        end = packed({"object": "rollouts.end", "id": "r", "model": "m", "usage": {}})
        return httpx.Response(200, content=b"".join([*frames, end]))

    def _group(self, index: int, prompt: Json, body: Json) -> bytes:
        n: int = prompt["n"] if "n" in prompt else body["n"]
        said = self.answer(prompt)
        failed = isinstance(said, dict)
        answer: Json = {"error": None, "text": "ok", "finish_reason": said, "weight_version": "1"}
        group: Json = {
            "object": "rollouts.group",
            "index": index,
            "metadata": prompt.get("metadata"),
            "error": said if failed else None,
            "annealing": body.get("annealing"),
            "sampling": {},
            "answers": [] if failed else [answer] * n,
        }
        return packed({"object": "rollouts.group", "groups": [group]}, 0 if failed else n)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Served:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ead_cli.rollout, "_PAUSE_S", 0.0)
    served = Served()

    def client(*args: Any, **options: Any) -> ead_client.Client:
        return made(*args, transport=httpx.MockTransport(served), **options)

    made = ead_client.Client
    monkeypatch.setattr(ead_client, "Client", client)
    return served


def rollout(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["rollout", *arguments], catch_exceptions=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def lines_of(path: str) -> list[Json]:
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what is read --------------------------------------------------------------------------------

ODD = "one\u2028two\u2029\u0085\x0b\x0c\x1c\x1d\x1e\x00\rend\U0001f600"


def test_every_character_of_a_prompt_survives(served: Served) -> None:
    sent = [{"text": ODD, "id": 2**63}, {"text": "three", "id": -(2**63), "x": 0.1, "odd": ODD}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in sent)
    Path("p.jsonl").write_text(text, newline="")
    assert rollout("p.jsonl", "--out", "out.jsonl").exit_code == 0
    assert served.texts == [ODD, "three"]
    metadata = [line["metadata"] for line in lines_of("out.jsonl")]
    assert metadata == [{k: v for k, v in line.items() if k != "text"} for line in sent]


def test_lines_of_text_end_at_newlines(served: Served) -> None:
    Path("p.txt").write_bytes(f"\ufeffhello \n\n{ODD}\r\n \ufefflast".encode())
    assert rollout("p.txt", "--out", "out.jsonl").exit_code == 0
    assert served.texts == ["hello ", ODD, " \ufefflast"]


def test_a_byte_order_mark_is_no_part_of_a_line(served: Served) -> None:
    Path("p.jsonl").write_text('\ufeff{"text": "a"}\n"b"\n')
    assert rollout("p.jsonl", "--out", "out.jsonl").exit_code == 0
    assert served.texts == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "x", "score": NaN}', "prompt.metadata.score: must be a finite number, got nan"),
        ('{"text": "x", "score": 1e999}', "prompt.metadata.score: must be a finite number, got in"),
        (
            '{"text": "x", "id": 18446744073709551616}',
            "prompt.metadata.id: must be an integer of 6",
        ),
        ('{"text": "a\\ud800b"}', "prompt.text: has '\\ud800' at 1, half of a character"),
        ('{"text": "x", "\\udfff": 1}', "prompt.metadata: a key has '\\udfff'"),
        ("[1, 2, 99999999999999999999]", "prompt.token_ids[2]: must be an integer of 64 bits"),
    ],
)
def test_a_line_that_cannot_be_sent_is_named_and_the_others_are_answered(
    line: str, says: str, served: Served
) -> None:
    Path("p.jsonl").write_text(f'"first"\n\n{line}\n"last"\n')
    result = rollout("p.jsonl", "--out", "out.jsonl")
    assert (result.exit_code, served.texts) == (1, ["first", "last"])
    assert "2 of 3 prompts" in result.stdout
    assert f"prompt 1: {says}" in result.stderr
    assert "(p.jsonl:3)" in result.stderr
    assert [entry["index"] for entry in lines_of("out.jsonl")] == [0, 2]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "p.jsonl:2: "),
        (b"7", "p.jsonl:2: must be a text, a list or an object"),
        (b'"\xff"', "p.jsonl:2: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "p.jsonl:2: "),
        (b'{"text": "x", "id": ' + b"9" * 5000 + b"}", "p.jsonl:2: "),
    ],
)
def test_a_line_that_is_no_prompt_ends_the_call_before_it_begins(
    line: bytes, says: str, served: Served
) -> None:
    Path("p.jsonl").write_bytes(b'"fine"\n' + line + b"\n")
    result = rollout("p.jsonl", "--out", "out.jsonl")
    assert result.exit_code == 1
    assert says in result.stderr
    assert not served.bodies
    assert not Path("out.jsonl").exists()


def test_metadata_of_every_kind_comes_back(served: Served) -> None:
    sent = [
        {"text": "a", "metadata": [1, {"b": None}]},
        {"text": "b", "metadata": "text"},
        {"text": "c", "metadata": 7, "id": 1},
        {"text": "d", "metadata": {"x": 1}, "id": 2},
        {"text": "e", "metadata": None, "id": 3},
        {"text": "f", "metadata": 0},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sent))
    assert rollout("p.jsonl", "--out", "out.jsonl").exit_code == 0
    metadata = [line["metadata"] for line in lines_of("out.jsonl")]
    assert metadata == [
        *([1, {"b": None}], "text", {"id": 1, "metadata": 7}, {"id": 2, "x": 1}, {"id": 3}, 0)
    ]


# --- what is not touched -------------------------------------------------------------------------


def test_a_file_that_is_not_ours_is_not_touched(served: Served, tmp_path: Path) -> None:
    Path("p.txt").write_text("a\nb")
    Path("link.jsonl").symlink_to("p.txt")
    Path("hard.jsonl").hardlink_to("p.txt")
    Path("foreign.jsonl").write_text('{"index": 0, "answers": []}\nno end')
    Path("folder").mkdir()
    Path("folder/model.safetensors").write_bytes(b"weights")
    Path("other.jsonl.settings.json").write_text('{"mine": 1}')
    Path("broken.jsonl.settings.json").write_text('{"prompts_')
    Path("file").write_text("a file")
    Path("is-a-folder.jsonl").mkdir()
    before = contents(tmp_path)
    for out, says in (
        ("p.txt", "is the file of prompts"),
        ("link.jsonl", "is the file of prompts"),
        ("hard.jsonl", "is the file of prompts"),
        ("foreign.jsonl", "nothing says what was asked"),
        ("folder", "nothing says what was asked"),
        (".", "nothing says what was asked"),
        ("/", "must be a .jsonl file or a folder"),
        ("other.jsonl", "does not say what ead rollout asked"),
        ("broken.jsonl", "does not say what ead rollout asked"),
        ("file", "must be a .jsonl file, or else a folder"),
        ("is-a-folder.jsonl", "must be a .jsonl file, or else a folder"),
        ("file/out.jsonl", "cannot write"),
    ):
        result = rollout("p.txt", "--out", out)
        assert result.exit_code == 1
        assert says in result.stderr, (out, result.stderr)
        assert not served.bodies
        assert contents(tmp_path) == before, out


@pytest.mark.parametrize(
    "text",
    [
        b"no end",
        b"one line\nno end",
        b'{"index": 0}\n',
        b'{"index":7,"answers":[]}\n',
        b'{"index":true,"answers":[]}\n',
        b"\n",
        b"\0\0\0",
        b"{",
    ],
)
def test_a_file_that_was_put_in_the_place_of_ours_is_not_touched(
    text: bytes, served: Served
) -> None:
    Path("p.txt").write_text("a\nb\n")
    assert rollout("p.txt", "--out", "out.jsonl").exit_code == 0
    ours = Path("out.jsonl").read_bytes()
    for whole in (text, ours + text):
        Path("out.jsonl").write_bytes(whole)
        result = rollout("p.txt", "--out", "out.jsonl")
        if text == b"{":  # may be the beginning of a line of ours
            assert result.exit_code == 0
            continue
        assert result.exit_code == 1
        assert "is not of ead rollout; nothing is changed" in result.stderr
        assert Path("out.jsonl").read_bytes() == whole


def test_only_what_was_cut_off_of_ours_is_dropped(served: Served) -> None:
    Path("p.txt").write_text("a\nb\n")
    assert rollout("p.txt", "--out", "out.jsonl").exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for end in (1, 5, first - 1, first, first + 1, len(whole) - 2, len(whole) - 1):
        served.bodies.clear()
        Path("out.jsonl").write_bytes(whole[:end])
        assert rollout("p.txt", "--out", "out.jsonl").exit_code == 0
        assert Path("out.jsonl").read_bytes() == whole
        # a line that lacks but its end is whole
        assert served.texts == ["a", "b"][whole[: end + 1].count(b"\n") :]


def test_foreign_files_in_a_folder_stay(served: Served) -> None:
    Path("p.txt").write_text("a\nb\n")
    assert rollout("p.txt", "--out", "packed").exit_code == 0
    foreign = {"model.safetensors": b"w", "12.safetensors": b"x", "\u0663.safetensors": b"y"}
    for name, data in foreign.items():
        Path("packed", name).write_bytes(data)
    Path("packed/000001.safetensors").unlink()
    served.bodies.clear()
    result = rollout("p.txt", "--out", "packed", "--json")
    assert json.loads(result.stdout)["answered_before"] == 1
    assert served.texts == ["b"]
    assert {name: Path("packed", name).read_bytes() for name in foreign} == foreign
    for name in ("000001.safetensors", "000002.safetensors"):
        good = Path("packed", name).read_bytes() if Path("packed", name).exists() else None
        Path("packed", name).write_bytes(b"not ours")
        result = rollout("p.txt", "--out", "packed")
        assert f"{name} is not of this ead rollout" in result.stderr
        assert Path("packed", name).read_bytes() == b"not ours"
        Path("packed", name).unlink() if good is None else Path("packed", name).write_bytes(good)


def test_two_calls_do_not_write_to_one_file(served: Served) -> None:
    Path("p.txt").write_text("a\nb\n")
    said = []

    def answer(prompt: Json) -> str:
        said.append(rollout("p.txt", "--out", "out.jsonl"))
        return "stop"

    served.answer = answer
    assert rollout("p.txt", "--out", "out.jsonl").exit_code == 0
    assert all("another ead rollout is writing" in result.stderr for result in said)
    assert len(lines_of("out.jsonl")) == 2


@pytest.mark.parametrize("out", ["out.jsonl", "packed"])
def test_answers_of_another_model_or_other_weights_are_not_mixed_in(
    out: str, served: Served
) -> None:
    Path("p.txt").write_text("a\nb\n")
    served.answer = lambda prompt: "stop" if prompt["text"] == "a" else {"message": "no"}
    assert rollout("p.txt", "--out", out, "--url", "http://one").exit_code == 1
    served.answer = lambda prompt: "stop"
    kept = dict(served.info)
    for name, value, says in (
        ("model_path", "/models/b", "another model: '/models/a', not '/models/b'"),
        ("weight_version", "2", "another weight_version: '1', not '2'"),
    ):
        served.info = {**kept, name: value}
        result = rollout("p.txt", "--out", out)
        assert result.exit_code == 1
        assert says in result.stderr
    served.info = kept
    result = rollout("p.txt", "--out", out, "--url", "http://two")
    assert result.exit_code == 0
    assert "the answers before came from http://one" in result.stderr
    settings = json.loads(Path(f"{out}.settings.json").read_text())
    assert (settings["model"], settings["weight_version"]) == ("/models/a", "1")
    assert settings["servers"] == ["http://two"]


def test_weights_that_change_meanwhile_are_told(served: Served) -> None:
    Path("p.txt").write_text("a\nb\nc\n")
    served.info["weight_version"] = "0"  # and answers come from 1
    result = rollout("p.txt", "--out", "out.jsonl")
    assert result.stderr.count("weights of version 1 answer now, as each answer says") == 1


# --- what is asked -------------------------------------------------------------------------------


def test_what_users_write_is_no_markup(served: Served) -> None:
    Path("p.txt").write_text("[/INST]\nagain\n")
    message = "got '[/INST]' [bold]x[/] :smile: " + "long " * 60

    def answer(prompt: Json) -> str | Json:
        return {"message": message + "end"} if prompt["text"] == "[/INST]" else "stop"

    served.answer = answer
    result = rollout("p.txt", "--out", "out.jsonl")
    assert result.exit_code == 1
    assert "1 of 2 prompts" in result.stdout
    assert f"prompt 0: {message}end (p.txt:1)\n" in result.stderr


def test_an_aborted_answer_is_asked_for_again(served: Served) -> None:
    Path("p.txt").write_text("a\nb\n")
    reasons = {"a": ["abort", "abort", "stop"], "b": ["length"]}
    served.answer = lambda prompt: reasons[prompt["text"]].pop(0)
    assert rollout("p.txt", "--out", "out.jsonl").exit_code == 0
    entries = {e["index"]: e["answers"][0]["finish_reason"] for e in lines_of("out.jsonl")}
    assert entries == {0: "stop", 1: "length"}
    assert served.texts == ["a", "b", "a", "a"]


def test_answers_that_are_always_aborted_are_told_and_not_written(served: Served) -> None:
    Path("p.txt").write_text("a\nb\n")
    served.answer = lambda prompt: "abort" if prompt["text"] == "a" else "stop"
    result = rollout("p.txt", "--out", "out.jsonl", "-n", "2")
    assert result.exit_code == 1
    assert "prompt 0: its answers were aborted by the server, 5 times" in result.stderr
    assert [entry["index"] for entry in lines_of("out.jsonl")] == [1]


def test_a_refused_prompt_does_not_take_the_others_with_it(served: Served) -> None:
    Path("p.txt").write_text("".join(f"{i}\n" for i in range(10)))

    def refuse(body: Json) -> Json | None:
        bad = [i for i, prompt in enumerate(body["prompts"]) if prompt["text"] in "37"]
        return {"message": "too [/odd]", "param": f"prompts.{bad[0]}.n"} if bad else None

    served.refuse = refuse
    result = rollout("p.txt", "--out", "out.jsonl")
    assert result.exit_code == 1
    assert "8 of 10 prompts" in result.stdout
    assert "prompt 3: too [/odd] (p.txt:4)" in result.stderr
    assert sorted(e["index"] for e in lines_of("out.jsonl")) == [0, 1, 2, 4, 5, 6, 8, 9]
    served.refuse = lambda body: {"message": "bad top_p", "param": "sampling_params.top_p"}
    result = rollout("p.txt", "--out", "other.jsonl")
    assert "HTTP 400: bad top_p" in result.stderr
    assert not Path("other.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (["-n", "100"], [40, 40, 20]),  # servers allow 4096 answers
        (["-n", "1"], [64, 36]),
        (["-n", "5000"], [1] * 100),
        (["-n", "100", "--per-call", "50"], [50, 50]),
    ],
)
def test_as_many_prompts_are_asked_at_once_as_servers_allow(
    arguments: list[str], calls: list[int], served: Served
) -> None:
    Path("p.txt").write_text("x\n" * 100)
    served.answer = lambda prompt: {"message": "never mind"}
    rollout("p.txt", "--out", "out.jsonl", *arguments)
    assert [len(body["prompts"]) for body in served.bodies] == calls


@pytest.mark.parametrize(
    ("arguments", "n", "params"),
    [
        ([], 1, {"max_new_tokens": 512}),
        (["--sampling", '{"max_new_tokens": 9, "top_p": 0.5}'], 1, {"max_new_tokens": 9}),
        (["--sampling", '{"n": 3}'], 3, {"max_new_tokens": 512}),
        (["--sampling", '{"n": 3}', "-n", "3"], 3, {"max_new_tokens": 512}),
        (["--max-new-tokens", "7", "-n", "2"], 2, {"max_new_tokens": 7}),
    ],
)
def test_sampling_is_honoured(arguments: list[str], n: int, params: Json, served: Served) -> None:
    Path("p.txt").write_text("x\n")
    assert rollout("p.txt", "--out", "out.jsonl", *arguments).exit_code == 0
    (body,) = served.bodies
    assert body["n"] == n
    assert {**body["sampling_params"], **params} == body["sampling_params"]
    assert "n" not in body["sampling_params"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sampling", '{"n": 3}', "-n", "2"], "--sampling: n is 3, and -n is 2"),
        (
            ["--sampling", '{"max_new_tokens": 3}', "--max-new-tokens", "2"],
            "--sampling: max_new_tokens is 3, and --max-new-tokens is 2",
        ),
        (["--sampling", '{"n": "3"}'], "--sampling: n must be an integer from 1 on, got '3'"),
        (["--sampling", '{"n": true}'], "--sampling: n must be an integer from 1 on, got True"),
        (["--sampling", '{"texts": false}'], "--sampling: texts is no sampling parameter"),
        (["--sampling", '{"annealing": {}}'], "--sampling: annealing is no sampling parameter"),
        (["--sampling", '{"top_p": NaN}'], "settings.sampling_params.top_p: must be a finite"),
    ],
)
def test_sampling_that_cannot_be_honoured_is_refused(
    arguments: list[str], says: str, served: Served, tmp_path: Path
) -> None:
    Path("p.txt").write_text("x\n")
    result = rollout("p.txt", "--out", "out.jsonl", *arguments)
    said = str(result.exception) if result.exception and result.exception.args else ""
    assert result.exit_code == 1
    assert says in result.stderr + said
    assert sorted(contents(tmp_path)) == ["p.txt"]
    assert not served.bodies
