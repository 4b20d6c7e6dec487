"""Choose between SGLang's GPU and CPU engines, before SGLang is imported."""

from __future__ import annotations

import os

from ead_sampler import cpu_kernels

CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"  # read by SGLang at import, in every process


def choose() -> str:
    """Set this process and its children up for the device they have, and say which, in words.

    An accelerator that torch can use is used as SGLang would by itself. Without one, SGLang's CPU
    engine is switched on, with plain-torch kernels where no compiled `sgl_kernel` exists.
    Idempotent; a CPU_ENGINE that the user has set is respected.
    """
    import torch

    if os.environ.get(CPU_ENGINE, "0") != "1":
        if torch.accelerator.is_available():
            return f"GPU ({torch.accelerator.current_accelerator()})"
        os.environ[CPU_ENGINE] = "1"
    if cpu_kernels.compiled_kernels_available():
        return "CPU, compiled sgl_kernel"
    cpu_kernels.use_torch_kernels()
    return "CPU, plain-torch kernels"


def is_cpu() -> bool:
    """Whether `choose` chose SGLang's CPU engine."""
    return os.environ.get(CPU_ENGINE) == "1"
