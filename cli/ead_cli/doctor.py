"""`ead doctor`: what is installed here, whether it fits together, and whether it samples right."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ead_sampler import cpu_kernels, device
from ead_sampler.defaults import default_annealing
from ead_sampler.schedules import AnnealingError


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    right: bool
    says: str


def examine() -> list[Finding]:
    """Everything, in the order in which a server would meet it. Stops where no more can be told."""
    chosen = device.choose()
    findings = [
        Finding("ead", True, version("ead")),
        Finding("torch", True, version("torch")),
        Finding("device", True, chosen),
        Finding("kernels", True, _kernels()),
    ]
    try:
        default = default_annealing()
        says = "none" if default is None else json.dumps(default)
        findings.append(Finding("default schedule", True, says))
    except AnnealingError as error:
        findings.append(Finding("default schedule", False, str(error)))
        return findings

    from ead_server import plugin

    problems = plugin.check_sglang()
    supported = f"sglang {plugin.SUPPORTED_SGLANG}"
    findings.append(Finding("SGLang", not problems, "; ".join(problems) or supported))
    if problems:
        return findings

    from sglang.srt.plugins import load_plugins

    load_plugins()
    missing = plugin.hooks_not_in_place()
    says = f"{len(plugin.HOOKS)} in place" if not missing else "missing: " + ", ".join(missing)
    findings.append(Finding("hooks", not missing, says))

    from ead_sampler.selftest import self_test

    started = time.perf_counter()
    problems = self_test("cpu" if device.is_cpu() else "cuda")
    says = "; ".join(problems) or f"sampled as told ({time.perf_counter() - started:.1f} s)"
    findings.append(Finding("self-test", not problems, says))
    return findings


def report(findings: list[Finding], *, as_json: bool) -> bool:
    """Print them; whether all is right."""
    right = all(finding.right for finding in findings)
    if as_json:
        print(json.dumps({"ok": right, "findings": [f._asdict() for f in findings]}))
        return right
    table = Table(show_header=False, box=None)
    for what, fine, says in findings:
        table.add_row("[green]ok[/]" if fine else "[bold red]wrong[/]", what, escape(says))
    Console(soft_wrap=True, emoji=False).print(table)
    return right


def _kernels() -> str:
    if not device.is_cpu():
        return "SGLang's own for this GPU"
    if cpu_kernels.compiled_kernels_available():
        return "compiled sgl_kernel"
    return "plain torch (ead_sampler/cpu_kernels)"
