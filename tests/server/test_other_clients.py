"""The examples of examples/clients, run as printed, each by the client that it is for. Their server
computes in bfloat16, as most do, and its numbers are looked at too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.reference import TINY_FLAGS, Reference
from helpers.serving import FAST, expected_temperatures
from helpers.weight_tensors import config, named_tensors, perturbed

from ead_client import Client
from ead_server.launch.process import ServerProcess
from trainer_bridge import weight_publisher

EXAMPLES = sorted(
    path for path in (ROOT / "examples" / "clients").iterdir() if path.suffix in (".py", ".sh")
)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """White space between JSON's tokens is left out: once cool, a random model, which has no reason
    to stop, goes on with it (6 of 256 answers were longer than 1,000 tokens)."""
    flags = (
        "--model-path",
        str(tiny_model),
        *(*TINY_FLAGS, "--dtype", "bfloat16"),
        "--constrained-json-disable-any-whitespace",
    )
    log = tmp_path_factory.mktemp("other-clients") / "server.log"
    with ServerProcess(flags, log) as process:
        process.wait_until_ready()
        yield process


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_prints_every_tokens_temperature(
    example: Path, server: ServerProcess, tmp_path: Path
) -> None:
    program = Path(sys.prefix) / "clients" / "bin" / "python"  # made by `make test`
    if example.suffix == ".sh":
        if not shutil.which("curl"):
            pytest.skip("needs curl")
        program = Path("/bin/sh")
    environ = {
        **os.environ,
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": "none",
        "LLM_USER_PATH": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would fetch it
    }
    ran = subprocess.run(
        [program, example], capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line.split() for line in ran.stdout.splitlines() if not line.startswith("#")]
    told = [(float(tau), float(logprob)) for tau, logprob, *_ in lines]
    begins = [index for index, (tau, _) in enumerate(told) if tau == 1.2]
    assert begins[0] == 0
    assert len(begins) == (2 if example.stem == "openai_async" else 1)
    for begin, end in zip(begins, [*begins[1:], len(told)], strict=True):
        want = expected_temperatures({"preset": "paper", "warmup": 0, "step": 0}, end - begin)
        assert [tau for tau, _ in told[begin:end]] == pytest.approx(want, abs=1e-6)
    assert all(logprob <= 0 for _, logprob in told)


def test_numbers_of_bfloat16_logits_are_float32_and_those_of_the_weights_that_were_sent(
    server: ServerProcess, tiny_model: Path, tmp_path: Path
) -> None:
    """Against Hugging Face's bfloat16 forward: the mean of 200 gaps, for the served model and for
    float32 weights that a trainer sent, which the server rounds. An eighth bit of a logit of 10 is
    0.04; a wrong temperature or other weights are off by nats."""
    half = Reference(tiny_model, torch.bfloat16)
    trained = perturbed(Reference(tiny_model), 1)
    with Client(server.url, admin_api_key=server.admin_api_key, timeout=120) as client:
        for version in ("default", "trained"):
            if version == "trained":
                publisher = weight_publisher(client, config("tensors", tmp_path))
                publisher.publish(named_tensors(trained), version)
                with torch.no_grad():
                    for ours, theirs in zip(
                        half.model.parameters(), trained.parameters(), strict=True
                    ):
                        ours.copy_(theirs)
            (group,) = client.rollouts(
                ["def "], n=5, annealing=FAST, max_new_tokens=40, ignore_eos=True, entropies=True
            ).groups
            gaps: dict[str, list[np.ndarray]] = {"pi": [], "mu": [], "entropy": []}
            for answer in group.answers:
                rollout = answer.rollout
                assert rollout is not None
                assert rollout.entropies is not None
                assert rollout.weight_version == version
                assert rollout.temperatures == pytest.approx(
                    expected_temperatures(FAST, 40), abs=1e-6
                )
                logits = half.logits(rollout.prompt_token_ids, rollout.token_ids)
                tau = torch.from_numpy(rollout.temperatures).double().unsqueeze(1)
                chosen = torch.from_numpy(rollout.token_ids).unsqueeze(1)
                pi = logits.log_softmax(-1)
                mu = (logits / tau).log_softmax(-1)
                gaps["pi"].append(rollout.model_logprobs - pi.gather(1, chosen)[:, 0].numpy())
                gaps["mu"].append(rollout.logprobs - mu.gather(1, chosen)[:, 0].numpy())
                gaps["entropy"].append(rollout.entropies + (pi.exp() * pi).sum(-1).numpy())
                said = torch.from_numpy(rollout.model_logprobs)
                assert (said == said.bfloat16().float()).float().mean() < 0.2  # not rounded
            for name, values in gaps.items():
                gap = np.concatenate(values)
                assert np.abs(gap).mean() < 0.1, name
                assert abs(gap.mean()) < 0.03, name
