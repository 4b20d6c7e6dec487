"""From annealed rollouts to on-device GRPO updates, and the new weights back to the server."""

from trainer_bridge.batch import RolloutBatch
from trainer_bridge.grpo import GrpoConfig, GrpoTrainer, StepReport
from trainer_bridge.losses import GrpoLoss, LossMetrics, group_advantages, grpo_loss
from trainer_bridge.policy import load_policy, token_logprobs
from trainer_bridge.weights import WeightPublisher

__all__ = [
    "GrpoConfig",
    "GrpoLoss",
    "GrpoTrainer",
    "LossMetrics",
    "RolloutBatch",
    "StepReport",
    "WeightPublisher",
    "group_advantages",
    "grpo_loss",
    "load_policy",
    "token_logprobs",
]
