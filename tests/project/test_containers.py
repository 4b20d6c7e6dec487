"""The compose file and the Dockerfiles, as far as they can be held to account without an engine."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from helpers.paths import ROOT
from helpers.reference import TINY_FLAGS

from ead_client import Client, RequestRefused
from ead_server.launch.process import ServerProcess
from ead_server.plugin import SUPPORTED_SGLANG


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return services


@pytest.fixture(scope="module")
def built(services: dict[str, Any]) -> dict[str, Any]:
    """The services that are ours."""
    return {name: service for name, service in services.items() if "build" in service}


def test_the_file_is_what_the_compose_specification_says() -> None:
    (wheel,) = (Path(sys.prefix) / "wheels").glob("docker_compose-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        schema = json.loads(archive.read("compose/config/compose_spec.json"))
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    # newer than the schema that this wheel brings
    assert compose.pop("name") == "ead"
    jsonschema.validate(compose, schema, jsonschema.Draft7Validator)
    compose["services"]["grafana"]["no_such_key"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(compose, schema, jsonschema.Draft7Validator)


def test_every_service_builds_from_a_file_that_is_there(built: dict[str, Any]) -> None:
    profiles = {profile for service in built.values() for profile in service["profiles"]}
    assert profiles == {"cpu", "gpu", "train-cpu", "train-gpu"}
    for service in built.values():
        dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
        assert "\nUSER ead\n" in dockerfile
        for target in re.findall(r"^RUN make (\w+)$", dockerfile, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for source in re.findall(r"^COPY (?!--)(\S+) ", dockerfile, re.MULTILINE):
            assert (ROOT / source).exists()


def test_what_is_mounted_is_there(services: dict[str, Any]) -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (
                (ROOT / source).exists()
                if source.startswith(".")
                else source in (compose["volumes"])
            )
    for secret in compose["secrets"].values():
        file = re.fullmatch(r"\$\{EAD_\w+_FILE:-(.*)\}", secret["file"])
        assert file is not None
        assert (ROOT / file[1]).read_bytes() == b""  # no key is the default, and none is in git


def test_ports_are_on_loopback_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert set(ports) == {f"127.0.0.1:{port}:{port}" for port in (3000, 9090, 30000)}


def test_the_command_gets_the_keys_that_there_are(built: dict[str, Any], tmp_path: Path) -> None:
    for service in built.values():
        shell, script, command = service["entrypoint"][0], *service["entrypoint"][1:]
        assert (shell, script) == ("/bin/sh", "/app/docker/with-keys.sh")
        assert command.startswith("ead ")
    (tmp_path / "api_key").write_text("secret")
    (tmp_path / "admin_api_key").touch()
    told = with_keys("echo $EXTRA $EAD_API_KEY_FILE", tmp_path, EXTRA="--tp 2").stdout
    assert told == f"--tp 2 {tmp_path}/api_key\n"
    assert "EAD_ADMIN_API_KEY_FILE" not in with_keys("env", tmp_path).stdout


def with_keys(command: str, secrets: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(ROOT / "docker" / "with-keys.sh"), command],
        env={"SECRETS": str(secrets), "PATH": "/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", []),
        ("--tp 2", ["--tp", "2"]),
        ("--model-path '/models/my model'", ["--model-path", "/models/my model"]),
        ('--override {\\"a\\":1}', ["--override", '{"a":1}']),
        ("""--override '{"a": [1, "x y"]}'""", ["--override", '{"a": [1, "x y"]}']),
        ("a $(touch made) `touch made`; touch made", None),
        ("* $HOME ~", ["*", "$HOME", "~"]),
    ],
)
def test_arguments_are_a_shell_s_words_and_nothing_of_them_is_run(
    given: str, words: list[str] | None, tmp_path: Path
) -> None:
    code = "import sys; print(sys.argv[2:])"
    ran = with_keys(f"python3 -c '{code}' first $EAD_ARGS", tmp_path, EAD_ARGS=given)
    assert ran.returncode == 0, ran.stderr
    told = ast.literal_eval(ran.stdout)
    assert told == (given.split() if words is None else words)
    assert not list(tmp_path.iterdir())


def test_a_quote_that_does_not_end_is_told(tmp_path: Path) -> None:
    ran = with_keys("echo $EAD_ARGS", tmp_path, EAD_ARGS="--model-path 'x")
    assert ran.returncode == 1
    assert ran.stderr == "with-keys.sh: No closing quotation: echo --model-path 'x\n"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_keys_that_are_their_owner_s_alone_reach_the_image_s_user(tmp_path: Path) -> None:
    """Secrets are mounted as they are: another user's, mode 600."""
    key = tmp_path / "api_key"
    key.write_text("secret")
    key.chmod(0o600)
    os.chown(key, 4321, 4321)
    ran = with_keys(
        "sh -c 'id -un; cat $EAD_API_KEY_FILE; echo; echo $EAD_API_KEY_FILE'",
        tmp_path,
        RUN_AS="nobody",
    )
    user, told, copy = ran.stdout.split()
    assert (user, told) == ("nobody", "secret")
    mode = os.stat(copy)
    assert (mode.st_mode & 0o777, mode.st_uid) == (0o400, 65534)
    shutil.rmtree(Path(copy).parent)


def test_whoever_reads_keys_may(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if "secrets" in service:
            assert service["user"] == "root", name


def sent_to_docker(paths: Iterable[str]) -> set[str]:
    """Those of the paths that .dockerignore leaves, by Docker's rules: the last pattern that a path
    or a folder above it matches decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = []
    for line in lines:
        pattern = line.removeprefix("!").strip("/")
        if not pattern or pattern.startswith("#"):
            continue
        text = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        rules.append((re.compile(text), not line.startswith("!")))
    left = set()
    for path in paths:
        above = [path, *map(str, Path(path).parents)][:-1]
        ignored = False
        for rule, ignores in rules:
            if any(rule.fullmatch(each) for each in above):
                ignored = ignores
        if not ignored:
            left.add(path)
    return left


def test_images_hold_the_project_and_no_keys_of_the_checkout() -> None:
    keys = [
        "key",
        "api_key",
        "my-key.txt",
        "admin.key",
        "tls.pem",
        ".env",
        "secrets.txt",
        "data.jsonl",
    ]
    folders = ["", "docker/", "server/", "server/ead_server/", "examples/", "keys/", "runs/"]
    lying = {
        f"{folder}{key}" for folder in folders for key in keys if key != "data.jsonl" or not folder
    }
    lying |= {"keys/mine", "runs/model.safetensors", ".git/config", ".venv/pyvenv.cfg"}
    assert sent_to_docker(lying) == set()
    packages = ("ead_sampler", "server", "client", "cli", "trainer_bridge", "examples")
    needed = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    needed |= {"LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements-cpu.txt"}
    needed |= {"docker/with-keys.sh"}
    assert sent_to_docker(needed) == needed


def steps_of(dockerfile: str) -> list[str]:
    """The commands of a Dockerfile, one line each."""
    text = (ROOT / dockerfile).read_text().replace("\\\n", " ")
    return re.findall(r"^RUN (.*)$", text, re.MULTILINE)


def served_by(
    service: dict[str, Any], environment: Path, app: Path, model: Path, log: Path
) -> ServerProcess:
    """The service's own entry point, with `environment` in place of the image's Python."""
    *_, command = service["entrypoint"]
    environ = {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "ENTRY": command.replace("$$", "$"),
        "EAD_ARGS": f"--model-path {model} {' '.join(TINY_FLAGS)}",
        "SECRETS": str(app),
        "APP": str(app),
    }
    start = 'cd "$APP"; EAD_ARGS="$EAD_ARGS $*" exec /bin/sh docker/with-keys.sh "$ENTRY"'
    return ServerProcess([], log, command=("/bin/sh", "-c", start, "sh"), environ=environ)


def test_the_cpu_image_s_steps_make_a_server(
    services: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """`make venv` made the environment that this test runs in; the rest is the system's."""
    ours = [step for step in steps_of("docker/cpu.Dockerfile") if not step.startswith("apt-get ")]
    assert ours == ["make venv"]
    with served_by(
        services["server-cpu"], Path(sys.prefix), ROOT, tiny_model, tmp_path / "log"
    ) as server:
        server.wait_until_ready()
        with Client(server.url) as client:
            assert client.complete("x", annealing={}, max_tokens=2).choices[0].rollout


def test_the_gpu_image_s_steps_make_a_server(
    services: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """What is in the wheel is enough: its environment sees the packages that SGLang's image would
    hold, and nothing of the checkout."""
    image, wheels, app = tmp_path / "image", tmp_path / "wheels", tmp_path / "app"
    venv.create(image, with_pip=True)
    (site,) = (image / "lib").glob("python*/site-packages")
    (packages,) = (Path(sys.prefix) / "lib").glob("python*/site-packages")
    (site / "base.pth").write_text(f"{packages}\n")
    *ours, last = steps_of("docker/gpu.Dockerfile")
    assert last.startswith("useradd ")
    environ = {**os.environ, "PATH": f"{image / 'bin'}:{os.environ['PATH']}"}
    for step in ours:
        moved = step.replace("/wheels", str(wheels))
        ran = subprocess.run(
            ["/bin/sh", "-c", moved], cwd=ROOT, env=environ, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    for copied in ("docker", "examples"):
        shutil.copytree(ROOT / copied, app / copied)
    code = "import ead_server, ead_sampler; print(ead_server.__file__, ead_sampler.__file__)"
    where = subprocess.check_output([image / "bin" / "python", "-c", code], text=True, cwd=app)
    assert where.count(str(site)) == 2
    with served_by(services["server-gpu"], image, app, tiny_model, tmp_path / "log") as server:
        server.wait_until_ready()
        with Client(server.url) as client:
            assert client.complete("x", annealing={}, max_tokens=2).choices[0].rollout
        assert "<svg" in httpx.get(f"{server.url}/annealing", timeout=30).text


def test_the_dashboard_shows_what_the_server_tells(
    services: dict[str, Any], server: ServerProcess, client: Client
) -> None:
    client.rollouts(["def "], annealing={}, entropies=True, max_new_tokens=4, ignore_eos=True)
    with pytest.raises(RequestRefused):
        client.complete("x", annealing={"tau_max": 99})
    told = httpx.get(f"{server.url}/metrics", timeout=30).text
    board = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "ead.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:ead_|sglang:)\w+", target["expr"])
    }
    assert len(asked) >= 10
    for name in asked:
        assert re.search(rf"^{name}[{{ ]", told, re.MULTILINE), name
    scraped = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:30000"]}]
    for name in ("server-cpu", "server-gpu"):
        assert services[name]["networks"]["default"]["aliases"] == ["server"]


def test_the_health_check_passes_on_a_live_server_and_fails_on_none(
    built: dict[str, Any], server: ServerProcess
) -> None:
    for service in (built["server-cpu"], built["server-gpu"]):
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
