"""Settings of a run: files, single settings on top, and refusals that say what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.paths import ROOT

from trainer_bridge.algorithms.loss_config import CispoLossConfig, ClipLossConfig
from trainer_bridge.errors import BadConfig
from trainer_bridge.run.config import TrainConfig, read_config
from trainer_bridge.run.report import changes

EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def test_later_settings_go_on_top_of_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = 7\n[rollout]\nprompts_per_step = 3\nmax_new_tokens = 9\n")
    more = tmp_path / "more.toml"
    more.write_text("[rollout]\nmax_new_tokens = 11\n")
    config = read_config([str(file), "rollout.prompts_per_step=4", str(more), "model.path=x"])
    assert (config.steps, config.model.path) == (7, "x")
    assert (config.rollout.prompts_per_step, config.rollout.max_new_tokens) == (4, 11)
    assert read_config([]) == TrainConfig()


def test_a_single_setting_is_toml_or_else_a_string() -> None:
    config = read_config(
        [
            "rollout.annealing={schedule='linear', length=40.0}",
            "optimizer.betas=[0.8, 0.9]",
            "loss.kind=gspo",
            "correction.kind='icepop'",
            "report.tensorboard=false",
        ]
    )
    assert config.rollout.annealing == {"schedule": "linear", "length": 40.0}
    assert config.optimizer.betas == (0.8, 0.9)
    assert (config.loss.kind, config.correction.kind) == ("gspo", "icepop")
    assert not config.report.tensorboard


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["steps=0"], r"steps: .*greater than or equal to 1, got 0"),
        (["optimizer.learning_rate=nan"], r"optimizer.learning_rate: .*finite number"),
        (["rollout.samples_per_prompt=1"], r"rollout.samples_per_prompt: .*equal to 2, got 1"),
        (["loss.kind=ppo"], r"loss.kind: .*'clip', 'cispo', 'gspo'.*, got 'ppo'"),
        (["loss.kind=ppo"], r"^loss.kind: .*, got 'ppo'$"),  # and nothing else
        (["loss.kind=[1]"], r"^loss.kind: .*'clip_cov' or 'kl_cov', got \[1\]$"),
        (["loss=3"], r"loss: .*valid dictionary.*, got 3"),
        (["loss.kind=gspo", "loss.clip_low=2"], r"^loss.clip_low: .*equal to 1, got 2$"),
        (["loss.clip_high=-1"], r"^loss.clip_high: .*equal to 0, got -1$"),
        (["rollout.temperature=1"], r"rollout.temperature: Extra inputs are not permitted"),
        (["optimizer.learning_rte=1"], r"did you mean learning_rate\? allowed: learning_rate, "),
        (["optimzer.learning_rate=1"], r"optimzer: .*did you mean optimizer\? allowed: steps, "),
        (["model.lora.rnk=3"], r"model.lora.rnk: .*did you mean rank\? allowed: rank, alpha"),
        (["steps=2", "steps.x=1"], r"steps.x: steps is not a section"),
        (["nowhere.toml"], r"cannot read nowhere.toml: No such file"),
        (["task.kind=a b"], r"task.kind: "),
        (["loss.kl_coefficient=0.1", "loss.kl_estimator=k1"], r"loss: .*k1 in the loss"),
    ],
)
def test_what_is_wrong_is_refused_with_what_is_allowed(arguments: list[str], says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        read_config(arguments)


@pytest.mark.parametrize(
    ("kind", "setting", "others"),
    [
        ("clip", "covariance_share=0.1", "clip_low, clip_high, dual_clip"),
        ("cispo", "dual_clip=3", "clip_low, clip_high"),
        ("gspo", "covariance_share=0.1", "clip_low, clip_high"),
        ("clip_cov", "dual_clip=3", "clip_low, clip_high, covariance_share, covariance_low, "),
        ("kl_cov", "clip_low=0.2", "covariance_share, kl_cov_coefficient"),
    ],
)
def test_a_setting_that_a_kind_of_loss_never_reads_is_refused_with_those_it_does(
    kind: str, setting: str, others: str
) -> None:
    """Beside what else is wrong there. Without a kind, it is "clip"."""
    arguments = [f"loss.{setting}", "loss.entropy_coefficient=x"]
    arguments += [f"loss.kind={kind}"] if kind != "clip" else []
    name, _, value = setting.partition("=")
    with pytest.raises(BadConfig) as refused:
        read_config(arguments)
    entropy, unknown = sorted(str(refused.value).splitlines(), key=lambda line: name in line)
    assert entropy.startswith("loss.entropy_coefficient: ")
    assert entropy.endswith(", got 'x'")
    assert unknown.startswith(f"loss.{name}: kind '{kind}' has no such setting (allowed: kind, ")
    assert f"selective_entropy_quantile, {others}" in unknown
    assert unknown.endswith(f"), got {value}")


def test_a_loss_without_a_kind_is_clip(tmp_path: Path) -> None:
    assert read_config(["loss.kl_coefficient=0.1"]).loss == ClipLossConfig(kl_coefficient=0.1)
    file = tmp_path / "run.toml"
    file.write_text("[loss]\nclip_high = 0.3\n")
    assert read_config([str(file)]).loss == ClipLossConfig(clip_high=0.3)
    changed = read_config([str(file), "loss.kind=cispo"]).loss
    assert changed == CispoLossConfig(clip_high=0.3)


def test_a_schedule_may_be_named() -> None:
    config = read_config(["rollout.annealing=paper", "evaluation.annealing='cosine'"])
    assert config.rollout.annealing == {"preset": "paper"}
    assert config.evaluation.annealing == {"schedule": "cosine"}
    with pytest.raises(BadConfig, match=r"rollout.annealing.schedule: must be one of"):
        read_config(["rollout.annealing=cosin"])


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("steps = = 3")
    with pytest.raises(BadConfig, match="is not TOML"):
        read_config([str(file)])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_settings(file: Path) -> None:
    assert read_config([str(file)]).task.build().problem(0).messages


@pytest.mark.parametrize("kind", ["clip", "cispo", "gspo", "clip_cov", "kl_cov"])
def test_settings_survive_being_written_down(tmp_path: Path, kind: str) -> None:
    """config.json of a run says everything that is needed to make it again."""
    config = read_config([f"loss.kind={kind}", "correction.cap=0", "model.lora={rank=4}"])
    written = config.model_dump(mode="json")
    again = TrainConfig.model_validate(json.loads(config.model_dump_json()))
    assert again.model_dump(mode="json") == written
    assert again.loss == config.loss
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert changes(tmp_path, again.model_dump(mode="json")) == []


def test_the_documentation_names_every_section() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    kinds = {name: type(field.default) for name, field in TrainConfig.model_fields.items()}
    sections = [name for name, kind in kinds.items() if kind not in (int, str)]
    assert len(sections) > 10
    assert not [name for name in sections if f"`{name}`" not in page]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("n", "rollout.samples_per_prompt"),
        ("max_new_tokens", "rollout.max_new_tokens"),
        ("annealing", "rollout.annealing"),
        ("texts", "the run itself"),
    ],
)
def test_sampling_parameters_with_a_setting_of_their_own_are_refused(
    name: str, setting: str
) -> None:
    with pytest.raises(BadConfig, match=f"rollout.sampling: .*{name} is set by {setting}"):
        read_config([f"rollout.sampling={{{name}=3}}"])
    assert read_config(["rollout.sampling={top_p=0.9}"]).rollout.sampling == {"top_p": 0.9}


@pytest.mark.parametrize(
    ("setting", "neutral"),
    [
        ("top_p=0.9", "top_p=1.0"),
        ("top_k=20", "top_k=-1"),
        ("min_p=0.05", "min_p=0.0"),
        ("repetition_penalty=1.1", "repetition_penalty=1.0"),
        ("frequency_penalty=0.5", "frequency_penalty=0.0"),
        ("presence_penalty=-0.5", "presence_penalty=0.0"),
        ("min_new_tokens=4", "min_new_tokens=0"),
        ("logit_bias={'5'=1.0}", "logit_bias={}"),
        ("regex='a+'", "stop='b'"),
    ],
)
def test_the_tempered_policy_is_trained_on_what_it_would_sample_alone(
    setting: str, neutral: str
) -> None:
    """Else the ratio of mu to the trained policy, which this correction takes for 1, is not."""
    name = setting.partition("=")[0]
    with pytest.raises(BadConfig, match=f"rollout.sampling.{name} .* correction.kind 'annealed'"):
        read_config(["correction.kind=annealed", f"rollout.sampling={{{setting}}}"])
    read_config(["correction.kind=annealed", f"rollout.sampling={{{neutral}}}"])
    read_config([f"rollout.sampling={{{setting}}}"])
