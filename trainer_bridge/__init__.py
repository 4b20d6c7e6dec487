"""From annealed rollouts to on-device GRPO updates, and the new weights back to the server.

`ead train` is trainer_bridge.run.loop. For a trainer of your own, these names; each is loaded when
it is first used, since reward workers import this package and must not pay for torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_FROM = {
    "policy.batch": ("RolloutBatch", "Sample"),
    "algorithms.logprobs": ("TokenLogprobs", "linear_logprobs"),
    "algorithms.advantages": (
        "AdvantageConfig",
        "advantages",
        "groups_with_signal",
        "overlong_penalty",
    ),
    "algorithms.loss_config": (
        "CispoLossConfig",
        "ClipCovLossConfig",
        "ClipLossConfig",
        "GspoLossConfig",
        "KlCovLossConfig",
        "LossConfig",
    ),
    "algorithms.losses": ("aggregation_weights", "kl_estimate", "policy_loss"),
    "algorithms.corrections": ("CorrectionConfig", "correction_metrics", "correction_weights"),
    "policy.policy": ("ModelConfig", "Policy", "load_policy"),
    "policy.trainer": ("OptimizerConfig", "ScoredAnswers", "Trainer", "UpdateConfig"),
    "tasks.rewards": ("Async", "Batched", "RewardConfig", "RewardFailure"),
    "tasks.reward_runner": ("RewardRunner",),
    "tasks.task": ("Problem", "Task", "TaskConfig"),
    "run.evaluate": ("EvaluationConfig", "evaluate"),
    "sync.publisher": ("SyncConfig", "weight_publisher"),
    "run.config": ("TrainConfig", "read_config"),
    "run.loop": ("train",),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}

__all__ = sorted(_MODULE_OF)


try:
    __version__ = version("ead")
except PackageNotFoundError:  # a copy of the sources, which nothing has installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise ModuleNotFoundError(
            f"trainer_bridge.{name} needs {missing}, which comes with the extra 'trainer' of "
            "ead: pip install 'ead[trainer]', or pip install '.[trainer]' in a clone",
            name=error.name,
        ) from error
