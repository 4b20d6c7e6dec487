"""From annealed rollouts to on-device GRPO updates, and the new weights back to the server."""

from trainer_bridge.advantages import AdvantageConfig, advantages
from trainer_bridge.batch import RolloutBatch, Sample
from trainer_bridge.corrections import CorrectionConfig, correction_weights
from trainer_bridge.losses import LossConfig, policy_loss

__all__ = [
    "AdvantageConfig",
    "CorrectionConfig",
    "LossConfig",
    "RolloutBatch",
    "Sample",
    "advantages",
    "correction_weights",
    "policy_loss",
]
