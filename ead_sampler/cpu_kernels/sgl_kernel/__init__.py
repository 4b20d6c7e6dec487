"""Plain-torch stand-in for the compiled package `sgl_kernel`, for SGLang on CPU without AMX.

SGLang's CPU mode imports these names unconditionally, and no registry has a CPU build of the real
package. `ead_sampler.cpu_kernels.use_torch_kernels` puts this folder on `sys.path` only where no
compiled `sgl_kernel` can be imported. What SGLang gates on AMX is absent on purpose: SGLang
guards those imports itself and takes its own torch path.

Verified against SGLang 0.5.23. Every function keeps the name, argument order and in-place effect
that its call site expects; shapes use bs for the requests of a batch.
"""

from sgl_kernel._cache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
)
from sgl_kernel._sampling import murmur_hash32_cpu
from sgl_kernel.speculative import (
    build_tree_kernel_efficient_cpu,
    fill_bonus_tokens_cpu,
    reconstruct_indices_from_tree_mask,
    rotate_input_ids_cpu,
    verify_tree_greedy_cpu,
)

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "murmur_hash32_cpu",
    "reconstruct_indices_from_tree_mask",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]
