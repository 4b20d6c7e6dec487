"""The names that users import. A change here is a change for all of them."""

from __future__ import annotations

import importlib
from importlib import metadata

import pytest

PUBLIC = {
    "ead_client": """
        AnnealingDict Completion ApiError AsyncClient Choice Chunk Client ConnectionFailed EadError
        Group MalformedAnswer NotSendable RequestRefused Rollout Rollouts ScheduleIgnored
        ServerUnavailable TimedOut
    """,
    "ead_sampler": """
        Annealing AnnealingError FieldError PRESETS REGISTRY parse_annealing suggest_schedule
    """,
    "ead_server": "ServerFailed ServerProcess",
    "trainer_bridge": """
        AdvantageConfig Async Batched CispoLossConfig ClipCovLossConfig ClipLossConfig
        CorrectionConfig EvaluationConfig GspoLossConfig KlCovLossConfig LossConfig ModelConfig
        OptimizerConfig Policy Problem RewardConfig RewardFailure RewardRunner RolloutBatch Sample
        ScoredAnswers SyncConfig Task TaskConfig TokenLogprobs TrainConfig Trainer UpdateConfig
        advantages aggregation_weights correction_metrics correction_weights evaluate
        groups_with_signal kl_estimate linear_logprobs load_policy overlong_penalty policy_loss
        read_config train weight_publisher
    """,
    "ead_cli": "",
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these_and_each_says_what_it_is(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            own = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
            assert (own or "").strip(), f"{package}.{name} has no docstring"


@pytest.mark.parametrize("package", PUBLIC)
def test_every_package_knows_its_version(package: str) -> None:
    assert importlib.import_module(package).__version__ == metadata.version("ead")
