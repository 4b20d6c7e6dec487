"""One real SGLang server on a tiny random model for the whole run, and what tests ask of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from helpers.reference import TINY_FLAGS, Reference
from helpers.tiny import make_tiny_model
from helpers.waiting import SCALE

from ead_client import Client
from ead_sampler import device
from ead_server.launch.process import ServerProcess

# of one test, with the server that it starts: what hangs fails, and the others go on
os.environ.setdefault("PYTEST_TIMEOUT", str(900 * SCALE))

os.environ["EAD_WEIGHTS_ROOT"] = tempfile.gettempdir()  # pytest's own folders are below it
device.choose()  # before anything imports transformers, see ead_sampler/device.py

# No deadline: these machines are shared. In CI the same examples every time; new ones elsewhere.
hypothesis.settings.register_profile("ead", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("ead")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs a running server: with several workers (`make test WORKERS=2`), one runs all
    of it. What has only so many seconds comes last, when the others are done."""
    for item in items:
        module: Any = getattr(item, "module", None)
        starts_one = "ServerProcess" in vars(module)
        if starts_one or "server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")
            item.add_marker(pytest.mark.xdist_group("server"))
    items.sort(key=lambda item: item.path.name == "test_dying.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


MAY_BE_MISSING = ("needs a GPU", "needs root", "no Chromium")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, Any]:
    """With EAD_NO_SKIPS, which `make test` sets, a test that is skipped for want of anything else
    has failed: comparisons with other projects must not vanish with their files."""
    report = yield
    if report.skipped and "EAD_NO_SKIPS" in os.environ and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr)
        if not any(known in reason for known in MAY_BE_MISSING):
            report.outcome, report.longrepr = "failed", f"not to be skipped here: {reason}"
    return report


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The extended server, with overlap scheduling on (SGLang's default)."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(["--model-path", str(tiny_model), *TINY_FLAGS], log) as process:
        process.wait_until_ready()
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url, admin_api_key=server.admin_api_key, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)
