"""The hash behind seeded sampling."""

from __future__ import annotations

import torch

_LOW_32 = 0xFFFFFFFF


# A custom op, not a plain function: SGLang calls it by its name in `torch.ops`, from inside a
# `torch.compile`d function, which therefore needs the shape function below.
@torch.library.custom_op("sgl_kernel::murmur_hash32_cpu", mutates_args=())
def murmur_hash32_cpu(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 (32 bits) of the 16 bytes seed, position, column; every row with every column.

    seed: uint64 or int64 [n]. positions: uint64 or int64 [n] and col_indices: int64 [m], of which
    the low 32 bits count. Returns uint32 [n, m].
    Called by `kernels/ops/sampling/murmur_hash.py: murmur_hash32`, for a request's `sampling_seed`.
    """
    # torch has no arithmetic on uint32, so int64 holds every 32-bit word. A product may
    # overflow int64; the low 32 bits, all that is kept, are right all the same.
    seed = seed.to(torch.int64)  # 2^63 and above wrap around: the bits stay
    hashed = torch.zeros_like(seed)
    for block in (seed, seed >> 32, positions.to(torch.int64)):
        hashed = _mix(hashed, _scramble(block))
    # Only from here on do the columns matter: one [n, m] buffer, updated in place.
    hashed = _mix(hashed[:, None], _scramble(col_indices)[None, :])
    hashed.bitwise_xor_(16)  # the length of the hashed key, bytes
    hashed.bitwise_xor_(hashed >> 16).mul_(0x85EBCA6B).bitwise_and_(_LOW_32)
    hashed.bitwise_xor_(hashed >> 13).mul_(0xC2B2AE35).bitwise_and_(_LOW_32)
    hashed.bitwise_xor_(hashed >> 16)
    return hashed.to(torch.uint32)


@murmur_hash32_cpu.register_fake
def _(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    return seed.new_empty((seed.shape[0], col_indices.shape[0]), dtype=torch.uint32)


def _scramble(block: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's preparation of a block, the low 32 bits of an int64."""
    block = (block * 0xCC9E2D51) & _LOW_32
    return (_rotate_left(block, 15) * 0x1B873593) & _LOW_32


def _mix(hashed: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Take a scrambled block into the hash; a new tensor of their broadcast shape."""
    hashed = _rotate_left(hashed ^ block, 13)
    return hashed.mul_(5).add_(0xE6546B64).bitwise_and_(_LOW_32)


def _rotate_left(word: torch.Tensor, bits: int) -> torch.Tensor:
    """Rotate 32-bit words held in int64."""
    return ((word << bits) & _LOW_32).bitwise_or_(word >> (32 - bits))
