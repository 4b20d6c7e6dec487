"""New weights reach the server whole or not at all, three ways, whoever dies in the middle.

Weights are told apart by log-probabilities: the tiny model's and those of perturbed copies differ
by nats, while the server and a Hugging Face forward of the same weights agree to 1e-4.
"""

from __future__ import annotations

import copy
import multiprocessing
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from helpers.answers import gaps
from helpers.reference import Reference
from helpers.waiting import wait_for
from helpers.weight_tensors import config, named_tensors, perturbed
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from ead_client import Client, Rollout, ServerUnavailable
from ead_server.launch.process import ServerProcess
from ead_server.weights.update import spool_prefix
from trainer_bridge import Policy, SyncConfig, weight_publisher
from trainer_bridge.errors import WeightUpdateFailed
from trainer_bridge.policy.policy import LoraConfig, ModelConfig, load_policy

WAYS = ("tensors", "distributed", "disk")
SCHEDULE = {"tau_max": 1.5, "tau_min": 0.3, "decay": 200.0, "step": 0}


def sample(client: Client, tokens: int = 24) -> Rollout:
    answer = client.complete("def ", annealing=SCHEDULE, max_tokens=tokens, ignore_eos=True)
    rollout = answer.choices[0].rollout
    assert rollout is not None
    return rollout


def serves(client: Client, model: Any, version: str) -> bool:
    rollout = sample(client)
    return rollout.weight_version == version and bool(gaps(rollout, model).max() < 1e-4)


@pytest.fixture(autouse=True)
def _original(client: Client, reference: Reference, tmp_path: Path) -> Iterator[None]:
    """Each test begins and ends with the tiny model, version "default"."""

    def restore() -> None:
        served = client.request("GET", "/v1/weights").json()
        if (served["version"], served["whole"]) != ("default", True):
            publisher = weight_publisher(client, config("disk", tmp_path / "original"))
            publisher.publish(named_tensors(reference.model), "default")

    restore()
    yield
    restore()


def spooled(server: ServerProcess) -> list[Path]:
    """Where the server keeps tensors that are coming."""
    return list(Path(tempfile.gettempdir()).glob(spool_prefix(server.process.pid) + "*"))


# --- what is published is what is served ----------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_after_each_way_the_server_samples_from_the_new_weights_and_says_so(
    way: str, server: ServerProcess, client: Client, reference: Reference, tmp_path: Path
) -> None:
    name = client.request("GET", "/v1/models").json()["data"][0]["id"]
    publisher = weight_publisher(client, config(way, tmp_path / "weights"))
    assert serves(client, reference.model, "default")
    for version in (7, 8):  # again, with what the first has set up
        new = perturbed(reference, version)
        report = publisher.publish(named_tensors(new), version)
        assert report.version == str(version)
        assert report.num_tensors == len(list(new.parameters()))
        assert report.num_bytes == sum(p.numel() for p in new.parameters()) * 4
        assert {"pause", "load", "total"} < set(report.seconds)
        assert client.model_info()["weight_version"] == str(version)
        rollout = sample(client)
        assert rollout.weight_version == str(version)
        assert gaps(rollout, new).max() < 1e-4
        assert gaps(rollout, reference.model).max() > 1
    assert client.request("GET", "/v1/models").json()["data"][0]["id"] == name
    assert client.request("GET", "/health/ready").json() == {"status": "ready"}
    assert not spooled(server)
    assert not (tmp_path / "weights").exists() or not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_s_dtype_becomes_the_server_s(
    way: str, client: Client, reference: Reference, tmp_path: Path
) -> None:
    new = perturbed(reference, 1)
    half = copy.deepcopy(new).bfloat16()
    report = weight_publisher(client, config(way, tmp_path)).publish(named_tensors(half), "half")
    assert report.num_bytes == sum(p.numel() for p in half.parameters()) * 4
    with torch.no_grad():  # weights alone: half's rotary frequencies are rounded too
        for ours, theirs in zip(new.parameters(), half.parameters(), strict=True):
            ours.copy_(theirs)
    assert serves(client, new, "half")


def adapted(tiny_model: Path, seed: int, targets: list[str]) -> Policy:
    """A policy whose adapters do something."""
    lora = LoraConfig(rank=4, alpha=12, targets=targets)
    policy, _ = load_policy(ModelConfig(path=str(tiny_model), lora=lora), "cpu")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
    return policy


def test_adapters_alone_make_what_their_merged_weights_make(
    server: ServerProcess, client: Client, reference: Reference, tiny_model: Path, tmp_path: Path
) -> None:
    publisher = weight_publisher(client, config("tensors", tmp_path))
    disk = weight_publisher(client, config("disk", tmp_path / "disk"))
    attention, mlp = ["q_proj", "o_proj"], ["up_proj", "down_proj"]
    for version, targets in enumerate((attention, attention + mlp, mlp)):
        # nothing is left of adapters that have gone, nor of other weights in between
        policy = adapted(tiny_model, version, targets)
        report = publisher.publish(policy.named_adapters(), version, lora_scale=policy.lora_scale)
        factors = list(policy.named_adapters())
        assert report.num_tensors == len(factors)
        assert report.num_bytes == 4 * sum(factor.numel() for _, factor in factors)
        merged = copy.deepcopy(policy.model).merge_and_unload()
        assert gaps(sample(client), reference.model).max() > 0.5
        assert serves(client, merged, str(version))
        if version == 1:
            disk.publish(named_tensors(perturbed(reference, 3)), "other")
    assert not spooled(server)


def without_one(factors: dict[str, Tensor]) -> str:
    name = next(name for name in factors if name.endswith("lora_B"))
    del factors[name]
    return f"1 missing: {name}"


def of_another_rank(factors: dict[str, Tensor]) -> str:
    name = next(name for name in factors if name.endswith("lora_B"))
    factors[name] = factors[name][:, :2].contiguous()
    return f"{name}: shape must be (64, 4)"


def of_another_width(factors: dict[str, Tensor]) -> str:
    name = next(name for name in factors if name.endswith("lora_A"))
    factors[name] = factors[name][:, :2].contiguous()
    return f"{name}: shape must be (r, 64)"


def of_a_vector(factors: dict[str, Tensor]) -> str:
    factors["model.norm.weight.lora_A"] = torch.zeros(4, 64)
    return "the model has no matrix 'model.norm.weight'"


def whole_weights(factors: dict[str, Tensor]) -> str:
    factors["model.norm.weight"] = torch.zeros(64)
    return "adapters are NAME.lora_A and NAME.lora_B, got 'model.norm.weight'"


def of_integers(factors: dict[str, Tensor]) -> str:
    name = next(iter(factors))
    factors[name] = factors[name].to(torch.int32)
    return f"{name}: dtype must be a float"


@pytest.mark.parametrize(
    "spoil",
    [without_one, of_another_rank, of_another_width, of_a_vector, whole_weights, of_integers],
)
def test_adapters_that_do_not_fit_are_a_400_and_the_old_weights_stay(
    spoil: Callable[[dict[str, Tensor]], str],
    client: Client,
    reference: Reference,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    factors = dict(adapted(tiny_model, 0, ["q_proj"]).named_adapters())
    says = spoil(factors)
    publisher = weight_publisher(client, config("tensors", tmp_path))
    with pytest.raises(WeightUpdateFailed, match=re.escape(says)) as failed:
        publisher.publish(factors.items(), 5, lora_scale=1.0)
    assert failed.value.serving == "default"
    assert serves(client, reference.model, "default")


def test_adapters_may_be_larger_than_other_bodies(
    client: Client, tiny_model: Path, tmp_path: Path
) -> None:
    """Than --max-body-bytes, 32 MiB: factors of rank 50,000 are."""
    matrix = "model.layers.0.self_attn.q_proj.weight"
    factors = {f"{matrix}.lora_A": torch.zeros(150_000, 64), f"{matrix}.lora_B": torch.zeros(64, 1)}
    publisher = weight_publisher(client, config("tensors", tmp_path, bucket_bytes=1 << 30))
    with pytest.raises(WeightUpdateFailed, match=r"not the length|lora_B: shape must be"):
        publisher.publish(factors.items(), 5, lora_scale=1.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e30])
def test_a_scale_that_is_none_is_refused(
    scale: float, client: Client, reference: Reference, tiny_model: Path, tmp_path: Path
) -> None:
    publisher = weight_publisher(client, config("tensors", tmp_path))
    policy = adapted(tiny_model, 0, ["q_proj"])
    with pytest.raises(WeightUpdateFailed, match="scale") as failed:
        publisher.publish(policy.named_adapters(), 5, lora_scale=scale)
    assert failed.value.serving == "default"
    assert serves(client, reference.model, "default")


def test_only_tensors_can_be_adapters(client: Client, tmp_path: Path) -> None:
    for way in ("distributed", "disk"):
        with pytest.raises(ValueError, match="adapters do not go by transport"):
            weight_publisher(client, config(way, tmp_path)).publish([], 1, lora_scale=1.0)


def test_prompts_seen_before_are_computed_anew(client: Client, reference: Reference) -> None:
    """The cache of the old weights' keys and values is gone: a long prompt shows it."""
    prompt = list(range(3, 200))
    for version in range(2):
        new = perturbed(reference, version)
        publisher = weight_publisher(client, SyncConfig())
        publisher.publish(named_tensors(new), version)
        answer = client.complete(prompt, rollout=True, max_tokens=8, ignore_eos=True)
        assert answer.choices[0].rollout is not None
        assert gaps(answer.choices[0].rollout, new).max() < 1e-4


def test_two_publishers_of_broadcasts_take_turns(
    client: Client, reference: Reference, tmp_path: Path
) -> None:
    """The server is in the group of the last one; the other makes a new one."""
    first, second = (weight_publisher(client, config("distributed", tmp_path)) for _ in range(2))
    for version, publisher in enumerate([first, second, first]):
        new = perturbed(reference, version)
        publisher.publish(named_tensors(new), version)
        assert serves(client, new, str(version))


def test_a_tied_head_is_named_once_and_experts_as_in_the_checkpoint(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    for model in (
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)),
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)),
    ):
        model.save_pretrained(tmp_path / "model")
        saved = load_file(tmp_path / "model" / "model.safetensors")
        named = dict(named_tensors(model))
        assert set(named) == set(saved)
        assert all(torch.equal(named[name], saved[name]) for name in saved)


# --- answers in progress -------------------------------------------------------------------------


class Generating:
    """One long answer, streamed in a thread; it has begun when this is made."""

    def __init__(self, client: Client, tokens: int) -> None:
        self._began = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._answer = self._pool.submit(self._run, client, tokens)
        assert self._began.wait(60)

    def _run(self, client: Client, tokens: int) -> list[Rollout]:
        parts = []
        messages = [{"role": "user", "content": "def "}]
        for chunk in client.stream_chat(
            messages, annealing=SCHEDULE, max_tokens=tokens, ignore_eos=True
        ):
            parts += [choice.rollout for choice in chunk.choices if choice.rollout is not None]
            if parts:
                self._began.set()
        return parts

    def result(self) -> Rollout:
        """The answer in one piece."""
        parts = self._answer.result(120)
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("token_ids", "temperatures", "logprobs", "model_logprobs")
        }
        prompt = next(p.prompt_token_ids for p in parts if p.prompt_token_ids is not None)
        return parts[-1].model_copy(update={**columns, "prompt_token_ids": prompt})


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_in_progress_goes_on_with_the_new_weights_and_says_which_tokens_are_whose(
    way: str, client: Client, reference: Reference, tmp_path: Path
) -> None:
    new = perturbed(reference, 2)
    publisher = weight_publisher(client, config(way, tmp_path))
    answer = Generating(client, 600)
    publisher.publish(named_tensors(new), "2")
    rollout = answer.result()
    assert len(rollout) == 600
    assert rollout.weight_versions is not None
    first, second = rollout.weight_versions
    assert (first["version"], second["version"]) == ("default", "2")
    assert 0 == first["start"] < first["end"] == second["start"] < second["end"] == 600
    cut = first["end"]
    assert gaps(rollout, reference.model)[:cut].max() < 1e-4
    assert gaps(rollout, new)[cut:].max() < 1e-4
    assert gaps(rollout, reference.model)[cut:].max() > 1


def test_abort_ends_what_is_in_progress(
    client: Client, reference: Reference, tmp_path: Path
) -> None:
    new = perturbed(reference, 3)
    answer = Generating(client, 3000)
    publisher = weight_publisher(client, config("tensors", tmp_path, pause="abort"))
    publisher.publish(named_tensors(new), "3")
    rollout = answer.result()
    assert rollout.finish_reason == "abort"
    assert 0 < len(rollout) < 3000
    assert gaps(rollout, reference.model).max() < 1e-4
    assert serves(client, new, "3")


def test_in_place_keeps_the_old_keys_and_values(
    client: Client, reference: Reference, tmp_path: Path
) -> None:
    new = perturbed(reference, 4)
    answer = Generating(client, 600)
    publisher = weight_publisher(client, config("tensors", tmp_path, pause="in_place"))
    publisher.publish(named_tensors(new), "4")
    rollout = answer.result()
    assert rollout.weight_versions is not None
    assert [span["version"] for span in rollout.weight_versions] == ["default", "4"]
    cut = rollout.weight_versions[0]["end"]
    assert gaps(rollout, reference.model)[: cut - 1].max() < 1e-4
    assert gaps(rollout, new)[cut:].max() > 1e-2  # no version's: the reason for another default


def test_an_engine_that_its_user_paused_stays_paused(
    client: Client, reference: Reference, tmp_path: Path
) -> None:
    client.request("POST", "/pause_generation", {"mode": "retract"}, admin=True)
    with pytest.raises(ServerUnavailable, match="paused"):
        client.request("GET", "/health/ready", repeatable=False)
    new = perturbed(reference, 5)
    weight_publisher(client, config("tensors", tmp_path)).publish(named_tensors(new), "5")
    assert httpx.get(f"{client.base_url}/health/ready").status_code == 503
    client.request("POST", "/continue_generation", {}, admin=True)
    assert serves(client, new, "5")


# --- what is refused ------------------------------------------------------------------------------


def post_tensors(client: Client, frames: list[bytes], version: str = "bad") -> httpx.Response:
    body = b"".join(len(frame).to_bytes(8, "little") + frame for frame in frames)
    return post(client, f"/v1/weights/tensors?version={version}", content=body)


def post(client: Client, path: str, **options: Any) -> httpx.Response:
    headers = dict(client._admin_headers)
    return httpx.post(client.base_url + path, headers=headers, timeout=60, **options)


def send(way: str, client: Client, tensors: dict[str, Tensor], folder: Path) -> httpx.Response:
    """As a foreign client would, without a publisher's own checks."""
    if way == "tensors":
        return post_tensors(client, [save(tensors)])
    if way == "disk":
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        return post(client, "/v1/weights/disk", json={"version": "bad", "folder": str(folder)})
    specs = [
        {"name": n, "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for n, t in tensors.items()
    ]
    group = {"name": "g", "master_address": "127.0.0.1", "master_port": 9, "backend": "gloo"}
    body = {"version": "bad", "group": group, "buckets": [specs]}
    return post(client, "/v1/weights/distributed", json=body)


def unknown(tensors: dict[str, Tensor]) -> str:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(4, 4)
    return "the model has no tensor 'model.layers.2.mlp.up_proj.weight'"


def missing(tensors: dict[str, Tensor]) -> str:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return "1 missing: model.layers.1.mlp.up_proj.weight"


def misshapen(tensors: dict[str, Tensor]) -> str:
    tensors["model.norm.weight"] = torch.ones(63)
    return "model.norm.weight: shape must be (64,), got (63,)"


def of_another_dtype(tensors: dict[str, Tensor]) -> str:
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    return "model.norm.weight: dtype must be float32, got bfloat16"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spoil", [unknown, missing, misshapen, of_another_dtype])
def test_what_does_not_fit_is_a_400_and_the_old_weights_stay(
    way: str,
    spoil: Callable[[dict[str, Tensor]], str],
    server: ServerProcess,
    client: Client,
    reference: Reference,
    tmp_path: Path,
) -> None:
    tensors = {name: t.clone() for name, t in named_tensors(perturbed(reference, 6))}
    says = spoil(tensors)
    response = send(way, client, tensors, tmp_path / "bad")
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert says in error["message"]
    assert error["param"] in error["message"]
    assert serves(client, reference.model, "default")
    assert not spooled(server)


@pytest.mark.parametrize("way", WAYS)
def test_a_publisher_says_what_was_wrong_and_what_is_served(
    way: str, client: Client, reference: Reference, tmp_path: Path
) -> None:
    publisher = weight_publisher(client, config(way, tmp_path / "weights"))
    steps = client.request("GET", "/v1/annealing/step").json()["weight_updates"]
    for spoil in (unknown, missing, misshapen):
        tensors = dict(named_tensors(perturbed(reference, 6)))
        says = spoil(tensors)
        with pytest.raises(WeightUpdateFailed) as failed:
            publisher.publish(tensors.items(), 6)
        assert says.partition("'")[2].rstrip("'") in str(failed.value)
        assert failed.value.serving == "default"
    assert serves(client, reference.model, "default")
    assert client.request("GET", "/v1/annealing/step").json()["weight_updates"] == steps
    new = perturbed(reference, 6)
    publisher.publish(named_tensors(new), 6)
    assert serves(client, new, "6")


def test_a_malformed_body_is_a_400(client: Client, reference: Reference) -> None:
    tensors = dict(named_tensors(reference.model))
    whole = save(tensors)
    framed = len(whole).to_bytes(8, "little") + whole
    norm = {"model.norm.weight": tensors["model.norm.weight"]}
    for body, says in [
        (b"", "missing"),
        (framed[:-1], "ended in the middle of a file"),
        (framed[:5], "not the length"),
        (framed + b"\x00" * 8, "not the length"),
        ((1 << 62).to_bytes(8, "little") + b"x", "not the length"),
        (framed + (16).to_bytes(8, "little") + b"x" * 16, "is not safetensors"),
        ((10).to_bytes(8, "little") + (2).to_bytes(8, "little") + b"{}", "without tensors"),
        (framed + len(save(norm)).to_bytes(8, "little") + save(norm), "came twice"),
    ]:
        response = post(client, "/v1/weights/tensors?version=bad", content=body)
        assert response.status_code == 400, (says, response.text)
        assert says in response.json()["error"]["message"]
    for query in ("", "?version=", "?version=1&pause=never"):
        response = post(client, f"/v1/weights/tensors{query}", content=framed)
        assert response.status_code == 400, query
    assert serves(client, reference.model, "default")


def test_a_refusal_reaches_a_client_that_is_still_sending(client: Client) -> None:
    def body() -> Iterator[bytes]:
        frame = save({"nonsense": torch.zeros(3)})
        yield len(frame).to_bytes(8, "little") + frame
        for _ in range(64):
            yield bytes(1 << 20)

    response = post(client, "/v1/weights/tensors?version=bad", content=body())
    assert response.status_code == 400
    assert "no tensor 'nonsense'" in response.json()["error"]["message"]


def test_weights_need_the_admin_key(server: ServerProcess) -> None:
    for path in ("tensors?version=1", "disk", "distributed"):
        response = httpx.post(f"{server.url}/v1/weights/{path}", json={})
        assert response.status_code == 401, path
        assert "needs the admin key" in response.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/weights").json()["whole"]
    manifest = httpx.get(f"{server.url}/v1/weights/manifest").json()
    norm = next(spec for spec in manifest if spec["name"] == "model.norm.weight")
    assert norm == {**norm, "dtype": "float32", "shape": [64], "required": True}


def test_a_folder_is_below_the_weights_root(client: Client) -> None:
    response = post(client, "/v1/weights/disk", json={"version": "1", "folder": "/etc"})
    assert response.status_code == 403
    assert "--weights-root" in response.json()["error"]["message"]


def test_sglang_s_own_route_refuses_a_shape_that_would_kill_it(
    client: Client, reference: Reference, tmp_path: Path
) -> None:
    tensors = {name: t.clone() for name, t in named_tensors(reference.model)}
    misshapen(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    response = post(client, "/update_weights_from_disk", json={"model_path": str(tmp_path)})
    assert response.status_code == 400
    assert "shape must be (64,), got (63,)" in response.json()["error"]["message"]
    assert serves(client, reference.model, "default")


def test_no_trainer_at_the_address_given_is_a_400(
    client: Client, reference: Reference, tmp_path: Path
) -> None:
    response = send("distributed", client, dict(named_tensors(reference.model)), tmp_path)
    assert response.status_code == 400
    assert "no trainer at 127.0.0.1:9" in response.json()["error"]["message"]
    assert serves(client, reference.model, "default")


# --- a trainer that dies in the middle -----------------------------------------------------------


class Gathered:
    """A tensor that is gathered when its turn comes, as a sharded one is; the last one never."""

    def __init__(self, tensor: Tensor, stuck: Any) -> None:
        self.shape = tensor.shape
        self._tensor = tensor
        self._stuck = stuck

    def full_tensor(self) -> Tensor:
        if self._stuck is not None:
            self._stuck.set()
            threading.Event().wait()
        return self._tensor


def publish_half(way: str, url: str, key: str, model: Path, folder: Path, stuck: Any) -> None:
    """In a process of its own: half of the model's perturbed weights, then nothing."""
    reference = Reference(model)
    tensors = list(named_tensors(perturbed(reference, 9)))
    half = len(tensors) // 2
    gathered: Any = [
        (name, Gathered(tensor, stuck if index == half else None))
        for index, (name, tensor) in enumerate(tensors)
    ]
    with Client(url, admin_api_key=key) as client:
        weight_publisher(client, config(way, folder)).publish(gathered, "half")


@pytest.fixture
def stuck_trainer(
    server: ServerProcess, tiny_model: Path, tmp_path: Path
) -> Iterator[Callable[[str], Any]]:
    """Starts a publisher and returns it when it is stuck in the middle."""
    context = multiprocessing.get_context("spawn")
    started = []

    def start(way: str) -> Any:
        stuck = context.Event()
        where = (server.url, server.admin_api_key, tiny_model, tmp_path / "half", stuck)
        process = context.Process(target=publish_half, args=(way, *where), daemon=True)
        process.start()
        started.append(process)
        assert stuck.wait(120)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("way", ["tensors", "disk"])
def test_a_trainer_killed_while_it_sends_leaves_the_old_weights_serving(
    way: str,
    server: ServerProcess,
    client: Client,
    reference: Reference,
    tmp_path: Path,
    stuck_trainer: Callable[[str], Any],
) -> None:
    trainer = stuck_trainer(way)
    if way == "tensors":
        wait_for(lambda: spooled(server))
        assert client.request("GET", "/health/ready").json() == {"status": "ready"}
        other = weight_publisher(client, config("disk", tmp_path / "other"))
        with pytest.raises(WeightUpdateFailed, match="version half is in progress") as failed:
            other.publish(named_tensors(reference.model), "other")
        assert failed.value.serving == "default"
    assert serves(client, reference.model, "default")  # while it comes
    trainer.kill()
    trainer.join()
    wait_for(lambda: not spooled(server))
    assert serves(client, reference.model, "default")
    new = perturbed(reference, 10)
    weight_publisher(client, config(way, tmp_path / "half")).publish(named_tensors(new), "half")
    assert serves(client, new, "half")
    assert not (tmp_path / "half").exists() or not list((tmp_path / "half").iterdir())


def test_a_trainer_killed_in_a_broadcast_leaves_a_server_that_waits_for_whole_weights(
    client: Client, reference: Reference, tmp_path: Path, stuck_trainer: Callable[[str], Any]
) -> None:
    answer = Generating(client, 3000)
    trainer = stuck_trainer("distributed")
    ready = httpx.get(f"{client.base_url}/health/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "updating to version half"})
    trainer.kill()
    trainer.join()
    wait_for(lambda: not client.request("GET", "/v1/weights").json()["whole"])

    says = "the weights are incomplete, waiting for a whole update: the update to version half"
    key = client._admin_headers  # the reason may name folders, so without a key it is not told
    ready = httpx.get(f"{client.base_url}/health/ready", headers=key)
    assert ready.status_code == 503
    assert says in ready.json()["status"]
    in_short = says.partition(":")[0]
    assert httpx.get(f"{client.base_url}/health/ready").json() == {"status": in_short}
    for path, body in (("/generate", {"text": "x"}), ("/v1/rollouts", {"prompts": ["x"]})):
        response = httpx.post(client.base_url + path, json=body, headers=key, timeout=10)
        assert response.status_code == 503
        assert says in response.json()["error"]["message"]
        response = httpx.post(client.base_url + path, json=body, timeout=10)
        assert response.json()["error"]["message"] == in_short
    response = post(client, "/continue_generation", json={})
    assert response.status_code == 409
    assert httpx.get(f"{client.base_url}/health/live").status_code == 200

    spoilt = {name: t.clone() for name, t in named_tensors(reference.model)}
    misshapen(spoilt)
    assert send("tensors", client, spoilt, tmp_path).status_code == 400
    assert httpx.get(f"{client.base_url}/health/ready").status_code == 503

    new = perturbed(reference, 11)
    publisher = weight_publisher(client, config("distributed", tmp_path))
    publisher.publish(named_tensors(new), "11")
    assert serves(client, new, "11")
    rollout = answer.result()  # it waited; none of its tokens is from the half
    assert rollout.weight_versions is not None
    first, second = rollout.weight_versions
    assert (first["version"], second["version"]) == ("default", "11")
    assert gaps(rollout, reference.model)[: first["end"]].max() < 1e-4
    assert gaps(rollout, new)[first["end"] :].max() < 1e-4


def test_a_failure_before_anything_was_broadcast_leaves_the_old_weights_serving(
    client: Client, reference: Reference, tmp_path: Path
) -> None:
    class Unreadable(Gathered):
        def full_tensor(self) -> Tensor:
            raise RuntimeError("out of memory")

    tensors: Any = [
        (name, Unreadable(tensor, None)) for name, tensor in named_tensors(perturbed(reference, 12))
    ]
    publisher = weight_publisher(client, config("distributed", tmp_path))
    with pytest.raises(WeightUpdateFailed) as failed:
        publisher.publish(tensors, 12)
    assert failed.value.serving == "default"
    assert failed.value.__cause__ is not None
    assert "out of memory" in str(failed.value.__cause__.__cause__)
    assert serves(client, reference.model, "default")


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "says nothing"])
def test_a_server_that_is_gone_is_told_in_time(
    silent: bool, reference: Reference, tmp_path: Path
) -> None:
    """Whether its port is closed, or takes connections that nobody answers: after the client's
    time-out (1 s here, of two requests), not after the 30 s that a broadcast may take."""
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        if silent:
            there.listen()
        url = f"http://127.0.0.1:{there.getsockname()[1]}"
        with Client(url, retries=0, timeout=1) as nobody:
            for way in WAYS:
                publisher = weight_publisher(nobody, config(way, tmp_path))
                began = time.monotonic()
                with pytest.raises(WeightUpdateFailed) as failed:
                    publisher.publish(named_tensors(reference.model), 1)
                assert failed.value.serving is None
                assert time.monotonic() - began < 20
