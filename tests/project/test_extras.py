"""What each extra of pyproject.toml installs is all that its part of the project imports.

Read from the sources and from the metadata of what is installed here; nothing is installed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from helpers.paths import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "ead_client": ROOT / "client/ead_client",
    "ead_sampler": ROOT / "ead_sampler",
    "ead_server": ROOT / "server/ead_server",
    "trainer_bridge": ROOT / "trainer_bridge",
}
# `ead chat`, `ead rollout`, `ead bench`: with a server elsewhere
OF_CLI = ("cli", "chat", "rollout", "rollout_files", "rollout_prompts", "bench")
# `ead train`, `ead eval`, `ead schedule`, `ead pull`
OF_TRAINER = ("training", "show_schedule", "models")
ELSEWHERE = {
    "ead_client._types": {"torch"},  # for who has it already
    "ead_sampler.cpu_kernels.sgl_kernel": {"sgl_kernel"},  # itself
}
COMMANDS = "ead_cli.main"
# what transformers looks for when it reads the embedded model's GGUF file
OF_GGUF = {"accelerate", "gguf"}


def files() -> dict[str, Path]:
    """Of every module of ours, by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


FILES = files()


def imports(module: str, *, at_once: bool) -> Iterator[str]:
    """Modules that it imports, in its functions too unless `at_once`; not for types alone."""
    tree = ast.parse(FILES[module].read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def foreign(modules: Iterable[str]) -> dict[str, str]:
    """Packages of others that the modules import, and those of ours that they import at once; with
    the module that does."""
    found: dict[str, str] = {}
    given, seen = set(modules), set[str]()
    waiting = list(given)
    while waiting:
        module = waiting.pop()
        if module in seen or module not in FILES:
            continue
        seen.add(module)
        for name in imports(module, at_once=module not in given):
            top = name.partition(".")[0]
            if top in PACKAGES:
                if module != COMMANDS:  # each command imports its own
                    waiting.append(name)
            elif top not in sys.stdlib_module_names:
                found.setdefault(top, module)
    return found


def requirements(extra: str | None) -> Iterator[Requirement]:
    """Of the project, with this extra or with none."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, lines):
        if requirement.name != PROJECT["name"]:
            yield requirement
        for inner in requirement.extras if requirement.name == PROJECT["name"] else ():
            yield from requirements(inner)


def installed(extra: str) -> set[str]:
    """Distributions that come with an extra, by their own metadata."""
    found: set[str] = set()
    waiting = [*requirements(None), *requirements(extra)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for inner in map(Requirement, lines):
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(inner)
    return found


def parts() -> dict[str, set[str]]:
    """The modules that are for each extra."""
    cli = {f"ead_server.{name}" for name in OF_CLI}
    trainer = {f"ead_server.{name}" for name in OF_TRAINER}
    trainer |= {name for name in FILES if name.startswith("trainer_bridge")}
    server = {name for name in FILES if name.startswith(("ead_server", "ead_sampler"))}
    return {"cli": cli, "trainer": cli | trainer, "server": server - trainer - {"ead_cli.demo"}}


@pytest.mark.parametrize("extra", ["cli", "trainer", "server"])
def test_an_extra_installs_all_that_its_part_imports(extra: str) -> None:
    there = installed(extra)
    distributions = packages_distributions()
    missing = {
        f"{package}, which {module} imports"
        for package, module in foreign(parts()[extra]).items()
        if package not in ELSEWHERE.get(module, ())
        and not there & {canonicalize_name(name) for name in distributions.get(package, ())}
    }
    assert not missing


@pytest.mark.parametrize("extra", ["trainer", "server"])
def test_the_embedded_model_can_be_converted(extra: str) -> None:
    assert installed(extra) >= OF_GGUF


def test_the_bare_install_is_the_light_client() -> None:
    names = {requirement.name for requirement in requirements(None)}
    client = foreign(name for name in FILES if name.startswith("ead_client"))
    assert set(client) - ELSEWHERE["ead_client._types"] == names


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["doctor"], "torch"),
        (["schedule", "paper"], "torch"),
        (["train", "steps=1"], "torch"),
        (["eval"], "torch"),
        (["serve"], "torch"),
    ],
)
def test_a_command_whose_extra_is_not_installed_says_so(
    command: list[str], missing: str, tmp_path: Path
) -> None:
    code = "import sys; sys.modules[sys.argv.pop(1)] = None; from ead_cli.main import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, missing, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 1
    assert f"ead: {missing} is not installed, and this command needs it: pip" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("ead_sampler.parse_annealing", "torch", "'trainer' or 'server'"),
        ("ead_sampler.PRESETS", "torch", "'trainer' or 'server'"),
        ("trainer_bridge.Trainer", "torch", "'trainer'"),
        ("trainer_bridge.read_config", "scipy", "'trainer'"),
    ],
)
def test_a_name_whose_extra_is_not_installed_says_so(name: str, missing: str, extra: str) -> None:
    module, _, what = name.partition(".")
    code = f"import sys; sys.modules[{missing!r}] = None; from {module} import {what}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert f"{name} needs {missing}, which comes with the extra {extra} of ead" in last
