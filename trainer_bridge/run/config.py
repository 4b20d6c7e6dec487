"""Every setting of a run, as one typed object: a TOML file, then overrides `section.key=value`."""

from __future__ import annotations

import codecs
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ead_sampler.schedules import AnnealingError, FieldError, check_all_steps, check_sampling
from trainer_bridge.algorithms.advantages import AdvantageConfig
from trainer_bridge.algorithms.corrections import CorrectionConfig
from trainer_bridge.algorithms.loss_config import ClipLossConfig, LossConfig
from trainer_bridge.errors import BadConfig
from trainer_bridge.policy.policy import ModelConfig
from trainer_bridge.policy.trainer import OptimizerConfig, UpdateConfig
from trainer_bridge.run.checkpoint import CheckpointConfig
from trainer_bridge.run.collect import RolloutConfig
from trainer_bridge.run.evaluate import EvaluationConfig
from trainer_bridge.run.report import ReportConfig
from trainer_bridge.settings import Settings
from trainer_bridge.sync.publisher import SyncConfig
from trainer_bridge.tasks.rewards import RewardConfig
from trainer_bridge.tasks.task import TaskConfig


class ServerConfig(Settings):
    """The server that samples. Its keys come from EAD_API_KEY and EAD_ADMIN_API_KEY, or from the
    files that EAD_API_KEY_FILE and EAD_ADMIN_API_KEY_FILE name."""

    url: str | None = Field(None, description="none: `ead train` starts one and stops it again")
    arguments: list[str] = Field(
        [],
        description="of SGLang, for a server started here, after ours: on a GPU bfloat16 and "
        "0.4 of its memory, the rest being the trainer's; on a CPU float32",
    )
    timeout_s: float = Field(
        600.0, gt=0, description="how long a server that went away may take to come back"
    )
    silence_s: float = Field(
        600.0,
        gt=0,
        description="how long an answer may send nothing before its connection counts as lost; "
        "while its engine is at work, a server sends a sign of life every 30 s",
    )


class TrainConfig(Settings):
    """One run. `correction` says what is trained: the policy at temperature 1, or tempered."""

    steps: int = Field(100, ge=1)
    seed: int = Field(
        0, ge=0, lt=1 << 20, description="of everything drawn here, and of which problems are used"
    )
    ranks_timeout_s: float = Field(
        86400.0,
        gt=0,
        description="with torchrun: how long ranks wait for rank 0 and its rollouts",
    )
    model: ModelConfig = ModelConfig()
    server: ServerConfig = ServerConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = ClipLossConfig()
    correction: CorrectionConfig = CorrectionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    update: UpdateConfig = UpdateConfig()
    sync: SyncConfig = SyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    evaluate_every: int = Field(0, ge=0, description="steps, and after the last; 0: never")
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        corrected = self.correction.kind not in ("none", "annealed")
        if self.rollout.staleness and not corrected and self.update.old_logprobs == "recompute":
            raise ValueError(
                f"rollout.staleness {self.rollout.staleness} with correction.kind "
                f"{self.correction.kind!r}: nothing says how far the policy has moved since the "
                "answers; set update.old_logprobs='server', or a correction of mu's ratio"
            )
        if "flash" in self.model.attention and self.model.compute_dtype == "float32":
            raise ValueError(
                f"model.attention {self.model.attention!r} takes no float32: set "
                "model.compute_dtype='bfloat16'"
            )
        rollout, evaluation = self.rollout, self.evaluation
        if rollout.overlong_buffer > rollout.max_new_tokens:
            raise ValueError(
                "rollout.overlong_buffer must be at most rollout.max_new_tokens, "
                f"{rollout.max_new_tokens}, got {rollout.overlong_buffer}"
            )
        _check_schedule("rollout", {**rollout.annealing, "step": None}, self.steps - 1)
        if evaluation.annealing is not None:
            _check_schedule("evaluation", evaluation.annealing, self.steps)
        try:
            check_sampling(rollout.sampling)
        except FieldError as error:
            raise ValueError(f"rollout.sampling.{error}") from None
        if self.correction.kind == "annealed":
            for name, neutral in _BESIDE_TEMPERATURE.items():
                value = self.rollout.sampling.get(name, neutral)
                if value not in (neutral, None, {}):
                    raise ValueError(
                        f"rollout.sampling.{name} {value!r} with correction.kind 'annealed', which "
                        "trains the policy at each token's temperature: answers must be sampled "
                        f"from just that ({name} {neutral!r}), or take a correction of mu's ratio"
                    )
        return self


def _check_schedule(section: str, annealing: dict[str, Any], last: int) -> None:
    """At every step of the run. Raises ValueError."""
    try:
        check_all_steps(annealing, last=last)
    except AnnealingError as error:
        raise ValueError(f"{section}.{error}") from None


# Sampling parameters by which mu is not the tempered policy, with the values that change nothing.
_BESIDE_TEMPERATURE: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "min_new_tokens": 0,
    **dict.fromkeys(("logit_bias", "regex", "json_schema", "ebnf", "structural_tag")),
}


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """The settings of TOML files, and single ones such as "rollout.samples_per_prompt=16", each on
    top of those before it.

    A single setting's value is TOML; what is not TOML is a string. Raises BadConfig.
    """
    raw: dict[str, Any] = {}
    for argument in arguments:
        path, equals, value = argument.partition("=")
        if not equals:
            _merge(raw, _read(Path(argument)))
            continue
        *sections, key = path.strip().split(".")
        table = raw
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise BadConfig(f"{path}: {section} is not a section")
        table[key] = _toml_value(value)
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        raise BadConfig(in_words(error, TrainConfig)) from None


def in_words(error: ValidationError, model: Any, *above: str) -> str:
    """What is wrong with settings of the sections `above`, a line each. model: what they make."""
    problems = error.errors(include_url=False)
    return "\n".join(_in_words(problem, model, above) for problem in problems)


def _in_words(problem: ErrorDetails, model: Any, above: tuple[str, ...]) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    unknown = problem["type"] == "extra_forbidden"
    named = "allowed" in problem.get("ctx", {})  # a kind of loss names its own settings
    allowed = _keys(model, problem["loc"][:-1]) if unknown and not named else []
    if allowed:
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        message += f" ({hint}allowed: {', '.join(allowed)})"
    place = ".".join(map(str, (*above, *problem["loc"])))
    if not problem["loc"]:  # of settings together, which it names
        return f"{place}: {message}" if place else message
    return f"{place}: {message}, got {problem['input']!r:.100}"


def _keys(model: Any, sections: Sequence[int | str]) -> list[str]:
    """The settings of a section, by its place in `model`; none where that cannot be told."""
    for section in sections:
        field = getattr(model, "model_fields", {}).get(section)
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return [*getattr(model, "model_fields", {})]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().removeprefix(codecs.BOM_UTF8).decode())
    except OSError as error:
        raise BadConfig(f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{file} is not TOML: {error}") from None


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
