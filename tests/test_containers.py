"""The compose file and the Dockerfiles, as far as they can be held to account without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ead_sampler.plugin import SUPPORTED_SGLANG
from ead_server.process import ServerProcess

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return services


def test_every_service_builds_from_a_file_that_is_there(services: dict[str, Any]) -> None:
    assert {profile for service in services.values() for profile in service["profiles"]} == {
        "cpu",
        "gpu",
    }
    for service in services.values():
        dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
        assert "\nUSER ead\n" in dockerfile
        for target in re.findall(r"^RUN make (\w+)$", dockerfile, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_ports_are_on_loopback_alone(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["ports"] == ["127.0.0.1:30000:30000"]


def test_the_health_check_passes_on_a_live_server_and_fails_on_none(
    services: dict[str, Any], server: ServerProcess
) -> None:
    for service in services.values():
        kind, program, *arguments = service["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python3")
        live = [sys.executable, *(a.replace("30000", str(server.port)) for a in arguments)]
        assert subprocess.run(live, timeout=30).returncode == 0
        dead = [sys.executable, *(a.replace("30000", "9") for a in arguments)]
        assert subprocess.run(dead, timeout=30, capture_output=True).returncode != 0


def test_one_sglang_version_everywhere() -> None:
    places = {
        "pyproject.toml": rf'"sglang=={SUPPORTED_SGLANG}"',
        "Makefile": rf"^SGLANG := sglang=={SUPPORTED_SGLANG}$",
        "docker/gpu.Dockerfile": rf"^FROM lmsysorg/sglang:v{SUPPORTED_SGLANG}$",
    }
    for name, pattern in places.items():
        assert re.search(pattern, (ROOT / name).read_text(), re.MULTILINE), name
