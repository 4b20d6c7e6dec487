"""From annealed rollouts to on-device GRPO updates, and the new weights back to the server.

`ead train` is trainer_bridge.loop. For a trainer of your own, these names; each is loaded when it
is first used, since reward workers import this package and must not pay for torch.
"""

from importlib import import_module
from typing import Any

_FROM = {
    "batch": ("RolloutBatch", "Sample"),
    "logprobs": ("TokenLogprobs", "linear_logprobs"),
    "advantages": ("AdvantageConfig", "advantages", "groups_with_signal", "overlong_penalty"),
    "losses": ("LossConfig", "aggregation_weights", "kl_estimate", "policy_loss"),
    "corrections": ("CorrectionConfig", "correction_metrics", "correction_weights"),
    "policy": ("ModelConfig", "Policy", "load_policy"),
    "trainer": ("OptimizerConfig", "ScoredAnswers", "Trainer", "UpdateConfig"),
    "rewards": ("Async", "Batched", "RewardConfig", "RewardFailure"),
    "reward_runner": ("RewardRunner",),
    "tasks": ("Problem", "Task", "TaskConfig"),
    "evaluate": ("EvaluationConfig", "evaluate"),
    "weights": ("SyncConfig", "weight_publisher"),
    "config": ("TrainConfig", "read_config"),
    "loop": ("train",),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
