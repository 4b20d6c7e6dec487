"""The settings of the losses: a class for each kind, so that none has those of another."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from trainer_bridge.settings import Settings

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KlEstimator = Literal["k1", "k2", "k3"]
LossKind = Literal["clip", "cispo", "gspo", "clip_cov", "kl_cov"]

_ClipLow = Annotated[
    float, Field(ge=0, le=1, description="bounds ratios below by 1 - clip_low; 1: not at all")
]
_ClipHigh = Annotated[float, Field(ge=0, description="bounds ratios above by 1 + clip_high")]
_CovarianceShare = Annotated[
    float, Field(gt=0, le=1, description="of the batch's tokens, which are selected")
]


class BaseLossConfig(Settings):
    """What the losses of all kinds have in common."""

    kind: LossKind
    aggregation: Aggregation = "token-mean"
    kl_coefficient: float = Field(0.0, ge=0, description="of KL(pi || reference); 0: no reference")
    kl_estimator: KlEstimator = "k2"
    kl_in: Literal["loss", "reward"] = Field("loss", description="k1 only in the reward")
    entropy_coefficient: float = Field(0.0, description="of the entropy bonus")
    selective_entropy_coefficient: float = Field(
        0.0, ge=0, description="SIREN: of (mean peak entropy - anchor)^2 (paper 0.005); 0: off"
    )
    selective_entropy_quantile: float = Field(
        0.8, ge=0, lt=1, description="SIREN: peaks are the tokens of at least this quantile"
    )

    @model_validator(mode="after")
    def _check_kl(self) -> Self:
        if self.kl_coefficient and (self.kl_in, self.kl_estimator) == ("loss", "k1"):
            raise ValueError(
                "the gradient of k1 in the loss does not depend on the reference: "
                "use k2, or kl_in='reward'"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _name_allowed_keys(cls, raw: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """A key of another kind is refused with those that this kind has."""
        try:
            return validate(raw)
        except ValidationError as error:
            unknown = PydanticCustomError(
                "extra_forbidden",
                "kind '{kind}' has no such setting (allowed: {allowed})",
                {
                    "kind": cls.model_fields["kind"].default,
                    "allowed": ", ".join(cls.model_fields),
                },
            )
            problems = [
                InitErrorDetails(
                    type=unknown if problem["type"] == "extra_forbidden" else problem["type"],
                    loc=problem["loc"],
                    input=problem["input"],
                    ctx=problem.get("ctx", {}),
                )
                for problem in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data(error.title, problems) from None


class ClipLossConfig(BaseLossConfig):
    """PPO's loss (arXiv 1707.06347) with DAPO's bounds (arXiv 2503.14476)."""

    kind: Literal["clip"] = "clip"
    clip_low: _ClipLow = 0.2
    clip_high: _ClipHigh = 0.28
    dual_clip: float = Field(
        3.0, ge=0, description="bound (> 1) on ratios where the advantage is < 0; 0: none"
    )

    @model_validator(mode="after")
    def _check_dual_clip(self) -> Self:
        if 0 < self.dual_clip <= 1:
            raise ValueError("dual_clip must be above 1, or 0 for none")
        return self


class CispoLossConfig(BaseLossConfig):
    """CISPO (arXiv 2506.13585). Its paper has no lower bound and gives no upper one: 5 is what TRL
    recommends, after ScaleRL (arXiv 2510.13786)."""

    kind: Literal["cispo"] = "cispo"
    clip_low: _ClipLow = 1.0
    clip_high: _ClipHigh = 4.0


class GspoLossConfig(BaseLossConfig):
    """GSPO-token (arXiv 2507.18071)."""

    kind: Literal["gspo"] = "gspo"
    clip_low: _ClipLow = 3e-4
    clip_high: _ClipHigh = 4e-4
    aggregation: Aggregation = "seq-mean-token-mean"


class ClipCovLossConfig(BaseLossConfig):
    """Clip-Cov (arXiv 2505.22617)."""

    kind: Literal["clip_cov"] = "clip_cov"
    clip_low: _ClipLow = 0.2
    clip_high: _ClipHigh = 0.28
    covariance_share: _CovarianceShare = 2e-4
    covariance_low: float = Field(1.0, description="selects among covariances above")
    covariance_high: float = Field(5.0, description="and below")

    @model_validator(mode="after")
    def _check_covariances(self) -> Self:
        if self.covariance_low > self.covariance_high:
            raise ValueError("covariance_low must not be above covariance_high")
        return self


class KlCovLossConfig(BaseLossConfig):
    """KL-Cov (arXiv 2505.22617), which bounds no ratios."""

    kind: Literal["kl_cov"] = "kl_cov"
    covariance_share: _CovarianceShare = 2e-4
    kl_cov_coefficient: float = Field(1.0, ge=0, description="penalty of selected tokens")


class _Kind(BaseModel):
    kind: LossKind = "clip"


_CLASSES: dict[LossKind, type[BaseLossConfig]] = {
    "clip": ClipLossConfig,
    "cispo": CispoLossConfig,
    "gspo": GspoLossConfig,
    "clip_cov": ClipCovLossConfig,
    "kl_cov": KlCovLossConfig,
}


def _of_its_kind(raw: Any) -> Any:
    """A table as the settings of its kind. The union alone would ask for a kind, and put its name
    into the place of every error."""
    if not isinstance(raw, dict):
        return raw
    return _CLASSES[_Kind.model_validate(raw).kind].model_validate(raw)


BoundedLossConfig: TypeAlias = ClipLossConfig | CispoLossConfig | GspoLossConfig | ClipCovLossConfig
LossConfig: TypeAlias = Annotated[
    ClipLossConfig | CispoLossConfig | GspoLossConfig | ClipCovLossConfig | KlCovLossConfig,
    Field(discriminator="kind"),
    BeforeValidator(_of_its_kind),
]
"""Settings of one kind of loss. Make them with the class of that kind, as `GspoLossConfig()`.

In a file they are the section `loss`, where `kind` names the class; without it, it is "clip".
`pydantic.TypeAdapter(LossConfig).validate_python({"kind": "gspo"})` reads such a table.
"""
