"""SGLang's own Sampler in this process, with our hooks around it: does it sample as told?"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch

from ead_sampler.in_scheduler import sampling
from ead_sampler.in_scheduler.rows import AnnealedRows, RowRequest
from ead_sampler.schedules import parse_annealing

DRAWS = 10_000  # per temperature
FALSE_ALARMS = 1e-9  # probability that a right sampler is called wrong
PROMPT, POSITION = 3, 22  # tokens; so the token sampled has t = 20


def standalone_sampler(on: str, **server_args: Any) -> Any:
    """SGLang's Sampler as its model runner makes it, without a server around it."""
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.runtime_context import get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    backends = {"sampling_backend": "pytorch", "attention_backend": "torch_native"}
    publish(ServerArgs(model_path="none", device=on, **backends, **server_args), role="scheduler")
    with get_parallel().override(tp_group=SimpleNamespace(device_group=None)):
        return Sampler()


def sampling_info(batch: int, vocabulary: int, on: str, temperature: float = 1.0) -> Any:
    """SGLang's SamplingBatchInfo of plain sampling requests."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    return SamplingBatchInfo(
        temperatures=torch.full((batch, 1), temperature, device=on),
        top_ps=torch.ones(batch, device=on),
        top_ks=torch.full((batch,), 1 << 30, dtype=torch.int32, device=on),
        min_ps=torch.zeros(batch, device=on),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=vocabulary,
        device=on,
    )


@torch.no_grad()
def self_test(on: str) -> list[str]:
    """What is wrong with sampling on device `on`; empty when nothing is. About a second.

    Draws tokens for rows with three schedules and for rows without, in one batch, and compares
    how often each came (chi-square), the temperatures and the log-probabilities with float64.
    """
    from scipy import stats
    from sglang.srt.layers.sampler import Sampler

    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    asked: list[tuple[float, RowRequest | None]] = [  # tau at t = 20, written out
        (max(1 + 1.2 - 2.718281828459045 ** (20 / 25), 0.1), _row({"preset": "paper", "step": 0})),
        (1.2 - 1.1 * 20 / 40, _row({"schedule": "linear", "length": 40.0})),
        (2.0, _row({"schedule": "two_stage", "switch": 21, "tau_max": 2.0})),
        (0.7, None),
    ]
    batch = DRAWS * len(asked)
    info = sampling_info(batch, len(logits), on, temperature=0.7)
    rows = AnnealedRows.build([row for _, row in asked for _ in range(DRAWS)], on)
    setattr(info, sampling.ROWS, rows)
    output = SimpleNamespace(
        next_token_logits=logits.to(on).repeat(batch, 1), auxiliary_device_output=None
    )
    positions = torch.full((batch,), POSITION, device=on)
    sampling.keep_model_logprobs(None, output, info)
    tokens = sampling.sample(
        inspect.unwrap(Sampler.forward),  # or hooks that are in place would be called twice
        standalone_sampler(on),
        output,
        info,
        False,
        [0] * batch,
        [[]] * batch,
        positions,
    )
    recorded = output.auxiliary_device_output.values.double().cpu().view(len(asked), DRAWS, -1)
    problems = []
    for (tau, _), drawn, values in zip(asked, tokens.cpu().view(-1, DRAWS), recorded, strict=True):
        log_mu, log_pi = ((logits.double() / t).log_softmax(-1) for t in (tau, 1.0))
        counts = torch.bincount(drawn, minlength=len(logits)).double()
        p_value = stats.chisquare(counts.numpy(), DRAWS * log_mu.exp().numpy()).pvalue
        if not p_value > FALSE_ALARMS:
            problems.append(f"tokens at temperature {tau:.3f} do not fit it (p = {p_value:.1e})")
        wanted = torch.stack([torch.full_like(log_mu[drawn], tau), log_mu[drawn], log_pi[drawn]])
        error = (values[:, :3].T - wanted).abs().max().item()
        if not error < 1e-5:
            problems.append(f"values recorded at temperature {tau:.3f} are off by {error:.1e}")
    return problems


def _row(schedule: dict[str, Any]) -> RowRequest:
    return RowRequest(PROMPT, parse_annealing(schedule))
