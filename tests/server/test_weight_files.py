"""What an update brings is read once, by one reader: whole, finite, regular files of one folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers.answers import gaps
from helpers.weights import (
    BAD_NUMBERS,
    NORM,
    UP,
    Tensors,
    message_of,
    post,
    post_folder,
    post_sglang,
    post_tensors,
    save_in,
    tensors_of,
)
from safetensors.torch import save, save_file

from ead_client import Client
from ead_sampler.in_scheduler.bad_numbers import is_finite
from ead_sampler.selftest import standalone_sampler
from ead_server.errors import WeightsRefused
from ead_server.launch.process import ServerProcess
from ead_server.weights.folders import check_numbers, open_folder
from ead_server.weights.manifest import Spec
from trainer_bridge import SyncConfig, weight_publisher
from trainer_bridge.errors import WeightUpdateFailed

Ask = Callable[..., httpx.Response]


@pytest.fixture
def unchanged(client: Client, reference: Any) -> Any:
    """A function that says that the tiny model is served, under the version of before."""
    version = client.model_info()["weight_version"]

    def check() -> None:
        assert client.request("GET", "/v1/weights").json()["whole"]
        assert client.model_info()["weight_version"] == version
        answer = client.complete([5, 6, 7], rollout=True, max_tokens=8, ignore_eos=True)
        rollout = answer.choices[0].rollout
        assert rollout is not None
        assert gaps(rollout, reference.model).max() < 1e-4

    return check


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", BAD_NUMBERS)
@pytest.mark.parametrize("way", ["tensors", "disk", "sglang"])
def test_a_number_that_is_none_is_a_400_and_the_old_weights_stay(
    way: str,
    spoil: Callable[[Tensors], str],
    client: Client,
    tiny_model: Path,
    tmp_path: Path,
    unchanged: Any,
) -> None:
    tensors = tensors_of(tiny_model)
    says = spoil(tensors)
    ways: dict[str, Ask] = {
        "tensors": lambda: post_tensors(client, tensors, "bad"),
        "disk": lambda: post_folder(client, save_in(tmp_path / "bad", tensors), "bad"),
        "sglang": lambda: post_sglang(client, save_in(tmp_path / "bad", tensors)),
    }
    assert says in message_of(ways[way]())
    unchanged()


@pytest.mark.parametrize("spoil", BAD_NUMBERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_broadcast_of_numbers_that_are_none_is_not_loaded(
    spoil: Callable[[Tensors], str],
    first: bool,
    client: Client,
    tiny_model: Path,
    tmp_path: Path,
    unchanged: Any,
) -> None:
    """In the first bucket nothing was loaded yet; after it the engine waits for a whole version."""
    tensors = tensors_of(tiny_model)
    says = spoil(tensors)
    name = says.partition(":")[0]
    ordered = sorted(tensors.items(), key=lambda item: (item[0] == name) != first)
    sync = SyncConfig(transport="distributed", bucket_bytes=40_000, timeout_s=30)
    publisher = weight_publisher(client, sync)
    with pytest.raises(WeightUpdateFailed, match="every number must be finite") as failed:
        publisher.publish(ordered, "bad")
    if first:
        assert failed.value.serving is not None
    else:
        assert failed.value.serving is None
        assert post_folder(client, tiny_model, "default").status_code == 200
    unchanged()


def test_adapters_that_are_no_numbers_or_make_none_are_a_400(
    client: Client, tiny_model: Path, unchanged: Any
) -> None:
    a, b = torch.ones(2, 64), torch.ones(128, 2)
    for factor_a, factor_b, scale, says in [
        (a * torch.nan, b, 1.0, f"{UP}.lora_A: every number must be finite"),
        (a, b * torch.inf, 1.0, f"{UP}.lora_B: every number must be finite"),
        (a * 1e20, b * 1e20, 1.0, f"{UP} with its adapter: every number must be finite"),
        (a * 1e18, b * 1e18, 1e4, f"{UP} with its adapter: every number must be finite"),
    ]:
        frame = save({f"{UP}.lora_A": factor_a, f"{UP}.lora_B": factor_b})
        body = len(frame).to_bytes(8, "little") + frame
        path = f"/v1/weights/adapters?version=bad&scale={scale}"
        assert says in message_of(post(client, path, content=body))
    unchanged()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=str,
)
def test_every_dtype_is_looked_at(dtype: torch.dtype, tmp_path: Path) -> None:
    """Piece by piece, wherever the number is."""
    good = torch.randn(300, 40).to(dtype)
    assert is_finite(good)
    for row, column in [(0, 0), (299, 39), (150, 7)]:
        infinities = [] if dtype == torch.float8_e4m3fn else [torch.inf, -torch.inf]
        for bad in [torch.nan, *infinities]:
            spoilt = good.float().clone()
            spoilt[row, column] = bad
            assert not is_finite(spoilt.to(dtype))
            save_file({"w": spoilt.to(dtype)}, tmp_path / "w.safetensors")
            with pytest.raises(WeightsRefused, match="w: every number must be finite"):
                check_numbers([tmp_path / "w.safetensors"], {})
    save_file({"w": good, "none": torch.empty(0, 3), "one": torch.tensor(1.0)}, tmp_path / "good")
    check_numbers([tmp_path / "good"], {})


def test_a_number_that_the_served_dtype_cannot_hold_is_none(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, 70_000.0])}, tmp_path / "w.safetensors")
    check_numbers([tmp_path / "w.safetensors"], {"w": Spec(dtype="bfloat16", shape=(2,))})
    with pytest.raises(WeightsRefused, match="finite as float16"):
        check_numbers([tmp_path / "w.safetensors"], {"w": Spec(dtype="float16", shape=(2,))})


# --- SGLang's own routes --------------------------------------------------------------------------


def missing(tensors: Tensors) -> str:
    del tensors[NORM]
    return f"1 missing: {NORM}"


def unknown(tensors: Tensors) -> str:
    tensors["nonsense"] = torch.ones(2)
    return "the model has no tensor 'nonsense'"


def integers(tensors: Tensors) -> str:
    tensors[NORM] = torch.ones(64, dtype=torch.int32)
    return f"{NORM}: dtype must be float32, got int32"


@pytest.mark.parametrize("spoil", [missing, unknown, integers])
def test_sglang_s_own_route_takes_what_ours_takes(
    spoil: Callable[[Tensors], str],
    client: Client,
    tiny_model: Path,
    tmp_path: Path,
    unchanged: Any,
) -> None:
    tensors = tensors_of(tiny_model)
    says = spoil(tensors)
    assert says in message_of(post_sglang(client, save_in(tmp_path / "bad", tensors)))
    unchanged()


def test_weights_without_a_version_do_not_go_by_the_old_name(
    client: Client, tiny_model: Path
) -> None:
    """And two of them not by the same."""
    seen = {client.model_info()["weight_version"]}
    for _ in range(2):
        assert post_sglang(client, tiny_model).json()["success"]
        version = client.model_info()["weight_version"]
        assert version.startswith("unnamed-")
        assert version not in seen
        seen.add(version)
        answer = client.complete("x", rollout=True, max_tokens=2)
        assert answer.choices[0].rollout is not None
        assert answer.choices[0].rollout.weight_version == version
    assert post_sglang(client, tiny_model, weight_version="default").json()["success"]
    assert client.model_info()["weight_version"] == "default"


@pytest.mark.parametrize(
    "path", ["/begin_weight_update", "/update_weights_from_distributed", "/end_weight_update"]
)
def test_sglang_s_own_broadcast_is_closed_and_ours_is_named(path: str, client: Client) -> None:
    assert "/v1/weights/distributed" in message_of(post(client, path, json={}), 403)


# --- files --------------------------------------------------------------------------------------


def a_link_out(folder: Path, model: Path) -> None:
    (folder / "model.safetensors").symlink_to("/etc/hostname")


def a_fifo(folder: Path, model: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


def a_fifo_as_index(folder: Path, model: Path) -> None:
    (folder / "model.safetensors").hardlink_to(model / "model.safetensors")
    os.mkfifo(folder / "model.safetensors.index.json")


def a_folder(folder: Path, model: Path) -> None:
    (folder / "model.safetensors").mkdir()


def a_socket(folder: Path, model: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "model.safetensors"))


def a_device(folder: Path, model: Path) -> None:
    (folder / "model.safetensors").symlink_to("/dev/zero")


def an_index_that_points_out(folder: Path, model: Path) -> None:
    (folder / "model.safetensors").hardlink_to(model / "model.safetensors")
    index = {"weight_map": {NORM: "../../etc/hostname"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def an_index_that_is_none(folder: Path, model: Path) -> None:
    (folder / "model.safetensors").hardlink_to(model / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)


def a_header_that_lies(folder: Path, model: Path) -> None:
    header = json.dumps({NORM: {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def a_header_without_end(folder: Path, model: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def nothing(folder: Path, model: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (a_link_out, 403),
        (a_device, 403),
        (a_fifo, 400),
        (a_fifo_as_index, 400),
        (a_folder, 400),
        (a_socket, 400),
        (an_index_that_points_out, 400),
        (an_index_that_is_none, 400),
        (a_header_that_lies, 400),
        (a_header_without_end, 400),
        (nothing, 400),
    ],
)
def test_what_is_no_regular_file_of_the_root_is_refused_at_once(
    spoil: Callable[[Path, Path], None],
    status: int,
    server: ServerProcess,
    client: Client,
    tiny_model: Path,
    tmp_path: Path,
    unchanged: Any,
) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    spoil(folder, tiny_model)
    message_of(post_folder(client, folder), status)
    message_of(post_sglang(client, folder), status)
    body = {"lora_name": "l", "lora_path": str(folder)}
    message_of(post(client, "/load_lora_adapter", json=body), status)
    assert httpx.get(f"{server.url}/health/live", timeout=5).status_code == 200
    unchanged()


@pytest.mark.parametrize("folder", ["/tmp/a\0b", "\0", "", "/tmp/no such", "/tmp/\udcff"])
def test_a_name_that_is_none_is_refused(folder: str, client: Client, unchanged: Any) -> None:
    headers = {"content-type": "application/json"}
    for path, field in [
        ("/v1/weights/disk", "folder"),
        ("/update_weights_from_disk", "model_path"),
        ("/load_lora_adapter", "lora_path"),
    ]:
        body = json.dumps({field: folder, "version": "1", "lora_name": "l"})
        if path != "/v1/weights/disk":
            body = json.dumps({field: folder, "lora_name": "l"})
        both = {**client._admin_headers, **headers}
        response = httpx.post(client.base_url + path, content=body, headers=both)
        assert response.status_code in (400, 403), response.text
        assert response.json()["error"]["message"]
    unchanged()


@pytest.fixture
def sglang() -> None:
    """SGLang's loader asks for the server's arguments."""
    standalone_sampler("cpu")


def test_links_inside_the_root_are_followed(sglang: None, tiny_model: Path, tmp_path: Path) -> None:
    """As a hub's cache has them."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    opened = open_folder(str(folder), tiny_model.parent.parent)
    assert [file.name for file in opened.files] == ["model.safetensors"]
    with pytest.raises(WeightsRefused, match="link to outside"):
        open_folder(str(folder), tmp_path)


def test_a_file_that_changes_after_it_was_checked_is_found_out(
    sglang: None, tiny_model: Path, tmp_path: Path
) -> None:
    folder = save_in(tmp_path / "w", tensors_of(tiny_model))
    opened = open_folder(str(folder), tmp_path)
    assert opened.unchanged
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert not opened.unchanged
    opened = open_folder(str(folder), tmp_path)
    (folder / "more.safetensors").write_bytes(b"")
    assert not opened.unchanged
