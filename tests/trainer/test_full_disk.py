"""A disk that takes nothing more delays what a run writes, and ends no run."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ead_client import Client
from trainer_bridge import SyncConfig, TrainConfig, weight_publisher
from trainer_bridge.errors import CheckpointFailed, WeightUpdateFailed
from trainer_bridge.policy.policy import ModelConfig, load_policy
from trainer_bridge.run.growing_files import write_whole
from trainer_bridge.run.report import ReportConfig, RunFolder, read_metrics
from trainer_bridge.run.retries import may_pass

CONFIG = TrainConfig().model_dump(mode="json")


@contextmanager
def full(size: int) -> Iterator[None]:
    """No file becomes larger than this: what is written up to there stands, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps_in(entries: list[dict[str, float]]) -> list[float]:
    return [entry["step"] for entry in entries]


def scalars(path: Path) -> list[tuple[int, float]]:
    """Of TensorBoard, as its own reader has them."""
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward/mean")]


@pytest.mark.parametrize("room", [0, 1, 40])
def test_what_a_full_disk_refuses_is_written_when_it_takes_it_again(
    room: int, tmp_path: Path
) -> None:
    """room: bytes of the next entry that still fit."""
    said: list[str] = []
    folder = RunFolder(tmp_path, ReportConfig(), CONFIG, 0, said.append)
    folder.metrics(0, {"reward/mean": 0.5})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with full(len(before) + room):
        for step in (1, 2):
            folder.samples(step, [{"text": "x" * 500}])
            folder.metrics(step, {"reward/mean": step / 4, "x": 1.0})
            assert (tmp_path / "metrics.jsonl").read_bytes() == before
        assert not list((tmp_path / "samples").glob("*"))
    assert len(said) == 1
    assert "cannot write" in said[0]
    assert "File too large" in said[0]
    folder.metrics(3, {"reward/mean": 0.75})
    assert steps_in(read_metrics(tmp_path)) == [0, 1, 2, 3]
    assert scalars(tmp_path) == [(0, 0.5), (1, 0.25), (2, 0.5), (3, 0.75)]
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-000001.jsonl", "step-000002.jsonl"]
    assert len(said) == 2
    folder.close()
    assert len(said) == 2


def test_a_run_that_ends_on_a_full_disk_says_what_is_missing(tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path, ReportConfig(tensorboard=False), CONFIG, 0, said.append)
    with full(0):
        folder.metrics(0, {"reward/mean": 0.5})
        folder.close()
    assert "lacks what could not be written" in said[-1]
    assert read_metrics(tmp_path) == []


def test_tensorboard_shows_a_resumed_run_s_steps_once(tmp_path: Path) -> None:
    first = RunFolder(tmp_path, ReportConfig(), CONFIG, 0)
    for step in range(3):
        first.metrics(step, {"reward/mean": 0.25})
    first.close()
    second = RunFolder(tmp_path, ReportConfig(), CONFIG, 1)
    second.metrics(1, {"reward/mean": 0.5})
    second.close()
    assert scalars(tmp_path) == [(0, 0.25), (1, 0.5)]


def test_metrics_of_a_resumed_run_are_whole_or_as_they_were(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, ReportConfig(tensorboard=False), CONFIG, 0)
    for step in range(50):
        folder.metrics(step, {"reward/mean": 0.25})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with full(1000), pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "metrics.jsonl", before * 2)
    with full(1000), pytest.raises(OSError, match="File too large"):
        RunFolder(tmp_path, ReportConfig(tensorboard=False), CONFIG, 40)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_that_does_not_fit_is_a_typed_failure(tiny_model: Path, tmp_path: Path) -> None:
    policy, tokenizer = load_policy(ModelConfig(path=str(tiny_model)), "cpu")
    with full(10_000), pytest.raises(CheckpointFailed, match=r"cannot write the model .* --resume"):
        policy.save(tmp_path / "model", tokenizer)
    policy.save(tmp_path / "model", tokenizer)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("I/O error: Permission denied (os error 13)"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
    ],
)
def test_weights_that_a_full_disk_refuses_are_published_again(
    error: Exception, passes: bool
) -> None:
    failed = WeightUpdateFailed(str(error), "7")
    failed.__cause__ = error
    assert may_pass(failed) is passes


def test_a_full_folder_of_weights_is_a_failed_update(tmp_path: Path) -> None:
    def served(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/weights/manifest":
            spec = {"name": "w", "dtype": "float32", "shape": [5000]}
            return httpx.Response(200, json=[spec])
        return httpx.Response(200, json={"version": "6", "whole": True})

    transport = httpx.MockTransport(served)
    with Client("http://server", admin_api_key="x", transport=transport) as client:
        publisher = weight_publisher(client, SyncConfig(transport="disk", folder=tmp_path))
        with full(1000), pytest.raises(WeightUpdateFailed, match=r"os error 27.*serves version 6"):
            publisher.publish([("w", torch.ones(5000))], 7)
    assert list(tmp_path.iterdir()) == []
