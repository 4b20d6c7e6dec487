"""The policy being trained: a Hugging Face causal LM, whole or through LoRA adapters.

One module from a packed batch to the log-probabilities of its trained tokens, so that FSDP sees one
root and the full logits never exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ead_sampler import device as engine
from trainer_bridge.algorithms.logprobs import TokenLogprobs, linear_logprobs
from trainer_bridge.errors import CheckpointFailed, UnsupportedModel
from trainer_bridge.policy import ranks
from trainer_bridge.policy.batch import RolloutBatch, Sample
from trainer_bridge.settings import Settings


class LoraConfig(Settings):
    """Low-rank adapters (arXiv 2106.09685) in place of training every weight."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    targets: str | list[str] = Field("all-linear", description="modules, as peft names them")


class ModelConfig(Settings):
    """Which policy is trained, and how it is computed."""

    path: str = Field("smollm2", description="folder or hub name; smollm2 is embedded")
    lora: LoraConfig | None = Field(None, description="none: every weight is trained")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the forward pass; the trained weights themselves are float32, which holds "
        "the small steps that bfloat16 would round away",
    )
    gradient_checkpointing: bool = Field(False, description="less memory, a third more compute")
    attention: str = Field("sdpa", description="transformers' attn_implementation")
    share_prompts: bool = Field(
        True,
        description="compute the prompt of a group once; only with sdpa, and not for models whose "
        "layers see a window of the last tokens",
    )


class Policy(nn.Module):
    """log pi, log pi at tau_t and entropy of a batch's trained tokens; see `forward`."""

    def __init__(
        self,
        model: Any,
        compute_dtype: torch.dtype = torch.float32,
        *,
        share_prompts: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        config = model.config.get_text_config()
        self.shares_prompts = (
            share_prompts
            and config._attn_implementation == "sdpa"
            and getattr(config, "sliding_window", None) is None
        )
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them
        self._scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        device: torch.device = next(self.parameters()).device
        return device

    @property
    def has_adapters(self) -> bool:
        """Whether only LoRA adapters are trained."""
        return hasattr(self.model, "peft_config")

    def batch(self, samples: Sequence[Sample]) -> RolloutBatch:
        """The samples as this policy takes them."""
        return RolloutBatch.build(samples, self.device, share_prompts=self.shares_prompts)

    def forward(self, batch: RolloutBatch, *, tempered: bool = False) -> TokenLogprobs:
        """Each float32 [N], with gradients; `tempered` at the batch's temperatures if asked for.

        Without a mask of the batch's, position_ids that begin again tell transformers that the
        samples do not see each other.
        """
        base, mask = self._base, batch.attention_mask
        with torch.autocast(
            batch.input_ids.device.type,
            torch.bfloat16,
            enabled=self.compute_dtype == torch.bfloat16,
        ):
            hidden = base.get_decoder()(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                attention_mask=None if mask is None else mask[None, None],
                use_cache=False,
            ).last_hidden_state[0]
        head = base.get_output_embeddings()
        return linear_logprobs(
            hidden[batch.predicting_positions].to(self.compute_dtype),
            head.weight.to(self.compute_dtype),
            batch.targets,
            temperatures=batch.temperatures if tempered else None,
            bias=None if head.bias is None else head.bias.to(self.compute_dtype),
            softcap=self._softcap,
            scale=self._scale,
        )

    @property
    def _base(self) -> Any:
        """The causal LM itself."""
        return self.model.get_base_model() if self.has_adapters else self.model

    def shard(self) -> None:
        """Divide the weights among the ranks of `torchrun`; nothing with one process."""
        ranks.shard(self, self._base.get_decoder().layers)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """A folder that transformers and SGLang load. Every rank must call it. Raises
        CheckpointFailed."""
        weights = {}
        for name, weight in self.named_weights():  # all ranks gather each, and one keeps it
            if ranks.rank() == 0:
                weights[name] = weight.cpu().contiguous()
        if ranks.rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
                for part in (self._base.config, self._base.generation_config, tokenizer):
                    part.save_pretrained(folder)
            except (OSError, SafetensorError) as error:
                raise CheckpointFailed(
                    f"cannot write the model to {folder}: {error}; --resume writes it of the last "
                    "checkpoint"
                ) from error

    def without_adapters(self) -> Any:
        """A context in which the policy is the model that its adapters were put on."""
        return self.model.disable_adapter() if self.has_adapters else nullcontext()

    @property
    def lora_scale(self) -> float:
        """s of W + s B A, what an adapted matrix W is together with its adapter's factors."""
        config = self.model.peft_config["default"]
        return float(config.lora_alpha / config.r)

    @torch.no_grad()
    def named_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """W.lora_A [r, in] and W.lora_B [out, r] for each adapted matrix W, by its name.

        Sharded ones are gathered as by `named_weights`.
        """
        for name, module in self._base.named_modules():
            if hasattr(module, "base_layer"):
                for factor in ("lora_A", "lora_B"):
                    weight = getattr(module, factor)["default"].weight
                    yield f"{name}.weight.{factor}", _whole(weight)

    @torch.no_grad()
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's weights by the names of its checkpoint, adapters merged in, a tied one once.

        Sharded weights are gathered one by one: every rank must walk through all of them.
        """
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        base = self._base
        weights = {}
        merged = {
            name: module for name, module in base.named_modules() if hasattr(module, "base_layer")
        }
        for name, weight in base.state_dict().items():
            if ".lora_" in name:
                continue
            module = merged.get(name.removesuffix(".base_layer.weight"))
            if module is not None and name.endswith(".weight"):
                weight = weight + module.get_delta_weight("default").to(weight.dtype)
            weights[name.replace(".base_layer.", ".")] = weight
        untied = remove_tied_weights_from_state_dict(weights, base)
        for name, weight in revert_weight_conversion(base, untied).items():
            yield name, _whole(weight)


def _whole(weight: Tensor) -> Tensor:
    """Of a sharded one, all of it; every rank must ask."""
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


def load_policy(
    config: ModelConfig, device: torch.device | str | None = None
) -> tuple[Policy, Any]:
    """The policy with float32 weights, and its tokenizer. device: default GPU if any.

    Raises UnsupportedModel when the policy's packed log-probabilities are not the model's own.
    """
    engine.choose()  # beside a CPU build of torch, transformers needs our torchvision schemas
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.path, dtype=torch.float32, attn_implementation=config.attention
    ).to(device)
    _without_dropout(model)
    # attention kernels that take no float32 are checked in what they take
    checked = torch.float32 if "flash" not in config.attention else torch.bfloat16
    _check(Policy(model, checked, share_prompts=config.share_prompts))
    if config.lora is not None:
        model = _with_adapters(model, config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()
    policy = Policy(model, getattr(torch, config.compute_dtype), share_prompts=config.share_prompts)
    return policy.train(), AutoTokenizer.from_pretrained(config.path)


def _without_dropout(model: Any) -> None:
    """Log-probabilities of the same weights are then the same in every pass: a ratio of two passes
    says how the policy changed, not which neurons were dropped."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or name == "layerdrop") and isinstance(value, float):
                setattr(module, name, 0.0)


def _with_adapters(model: Any, config: LoraConfig) -> Any:
    try:
        import peft
    except ImportError:
        raise UnsupportedModel("model.lora needs: pip install peft") from None
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.targets,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:  # no such modules, or none that can have adapters
        raise UnsupportedModel(f"model.lora.targets: {error}") from None
    base: Any = adapted.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, peft.tuners.lora.ParamWrapper):  # peft's way to adapt experts
            raise UnsupportedModel(
                f"model.lora.targets {config.targets!r}: an adapter on {name}, the experts of a "
                "mixture or what chooses them, is not supported, since the server takes adapters "
                "of single matrices; choose others, such as ['q_proj', 'k_proj', 'v_proj', "
                "'o_proj']"
            )
    for part in ("input", "output"):
        if hasattr(getattr(base, f"get_{part}_embeddings")(), "base_layer"):
            raise UnsupportedModel(
                f"model.lora.targets {config.targets!r}: an adapter on the model's {part} "
                "embeddings would not be trained, since log-probabilities are computed from their "
                "own weights; choose modules of the layers"
            )
    return adapted


@torch.no_grad()
def _check(policy: Policy) -> None:
    """Three short samples packed, two with the same prompt, give what the model gives for each.

    Catches models that do not keep packed samples apart (recurrent ones), logits that are more
    than a linear head with the corrections that we know, and what is random while training.
    """
    rough = policy.compute_dtype != torch.float32
    policy.eval()
    ids = [np.array(tokens) for tokens in ([7, 14, 21, 28, 35], [7, 14, 21, 9], [11, 22, 33])]
    trained = [np.arange(len(tokens)) >= min(3, len(tokens) - 1) for tokens in ids]
    numbers = [np.zeros(int(part.sum()), np.float32) for part in trained]
    samples = [
        Sample(tokens, part, zeros, zeros, zeros)
        for tokens, part, zeros in zip(ids, trained, numbers, strict=True)
    ]
    want = []
    for sample in samples:
        tokens = torch.from_numpy(sample.token_ids).to(policy.device)
        with torch.autocast(policy.device.type, policy.compute_dtype, enabled=rough):
            rows = policy.model(tokens[None]).logits[0, sample.prompt_length - 1 : -1].float()
        chosen = tokens[sample.prompt_length :, None]
        want.append(rows.log_softmax(-1).gather(1, chosen).squeeze(1))
    packed = policy.train()(policy.batch(samples)).logprobs
    error = (packed - torch.cat(want)).abs().max().item()
    if not error < (0.25 if rough else 1e-2):
        kind = type(policy.model).__name__
        raise UnsupportedModel(
            f"{kind}: packed log-probabilities differ from the model's own by {error:.2g} nats"
        )
