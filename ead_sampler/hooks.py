"""What annealed sampling touches in SGLang, in one table.

`ead_server.plugin` checks each entry at start-up and registers it.
"""

from __future__ import annotations

from typing import NamedTuple


class Hook(NamedTuple):
    """One place in SGLang that is wrapped. `ours` is called as SGLang's HookType says."""

    target: str  # dotted name in SGLang
    parameters: str  # its parameter names in SUPPORTED_SGLANG: a change means a new look
    kind: str  # name of a SGLang HookType
    ours: str  # "module:function"
    why: str


_BATCH = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

HOOKS = (
    # scheduler process: per-row state follows the batch (SGLang's placeholders for extension)
    Hook(
        f"{_BATCH}.adjusted_from_schedule_batch",
        "self batch vocab_size",
        "AFTER",
        "ead_sampler.in_scheduler.sampling:build_rows",
        "a new batch gets a row of schedule parameters per request",
    ),
    Hook(
        f"{_BATCH}.adjusted_filter_batch",
        "self keep_indices keep_indices_device",
        "AFTER",
        "ead_sampler.in_scheduler.sampling:filter_rows",
        "rows leave with finished requests",
    ),
    Hook(
        f"{_BATCH}.adjusted_merge_batch",
        "self other",
        "AFTER",
        "ead_sampler.in_scheduler.sampling:merge_rows",
        "rows of prefilled requests join the running ones",
    ),
    Hook(
        f"{_BATCH}.copy_for_forward",
        "self",
        "AFTER",
        "ead_sampler.in_scheduler.sampling:keep_rows",
        "the copy that a step in flight uses drops attributes that are not dataclass fields",
    ),
    # scheduler process: one sampling step
    Hook(
        f"{_RUNNER}._preprocess_logits",
        "self logits_output sampling_info observer",
        "BEFORE",
        "ead_sampler.in_scheduler.sampling:keep_model_logprobs",
        "model log-probabilities are those before penalties, bias and grammar masks",
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler.forward",
        "self logits_output sampling_info return_logprob top_logprobs_nums token_ids_logprobs "
        "positions logprob_logits",
        "AROUND",
        "ead_sampler.in_scheduler.sampling:sample",
        "sets each row's temperature, whatever the sampling backend, and records the outcome",
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler._sample_from_probs",
        "self probs sampling_info positions simple_sampling_case",
        "BEFORE",
        "ead_sampler.in_scheduler.bad_numbers:mend_probabilities",
        "one row of NaN ends the server, with all that it was generating",
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler._sample_from_probs",
        "self probs sampling_info positions simple_sampling_case",
        "AROUND",
        "ead_sampler.in_scheduler.seeds:draw",
        "a seed's tokens change when another request has top_p or top_k; min_p ends the server",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        "self batch result",
        "BEFORE",
        "ead_sampler.in_scheduler.bad_numbers:end_bad_requests",
        "a request whose logits are no numbers would go on with some token",
    ),
    # scheduler process, a broadcast of weights
    Hook(
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
        ".receive_weights_from_distributed",
        "self names dtypes shapes group_name load_format",
        "AFTER",
        "ead_sampler.in_scheduler.bad_numbers:check_received",
        "weights that are no numbers are refused before they are loaded",
    ),
    # scheduler process, at its start
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_model_worker",
        "self",
        "AFTER",
        "ead_sampler.in_scheduler.sampling:seed_data_parallel_rank",
        "SGLang seeds all data-parallel ranks alike: answers of one group would repeat each other",
    ),
    # tokenizer process
    Hook(
        "sglang.srt.sampling.sampling_params.SamplingParams.verify",
        "self vocab_size",
        "AFTER",
        "ead_sampler.in_tokenizer.generate:verify_sampling_params",
        "a bad schedule is a 400 on every route instead of a dead scheduler",
    ),
    Hook(
        f"{_MANAGER}.generate_request",
        "self obj request",
        "AROUND",
        "ead_sampler.in_tokenizer.generate:generate_request",
        "`annealing` travels in custom_params; answers say what was applied",
    ),
    Hook(
        f"{_MANAGER}.update_request_meta_info",
        "self meta_info state customized_info index finish_reason",
        "AROUND",
        "ead_sampler.in_tokenizer.answers:drop_empty_columns",
        "requests that asked for nothing must not grow columns of None",
    ),
    Hook(
        f"{_MANAGER}._handle_abort_req",
        "self recv_obj",
        "AROUND",
        "ead_sampler.in_tokenizer.answers:keep_columns_of_aborted",
        "an answer that is aborted while it waits, after a retraction, keeps what was recorded",
    ),
    *(
        Hook(
            f"{_MANAGER}.{method}",
            "self obj request",
            "AROUND",
            "ead_sampler.in_tokenizer.generate:count_weight_update",
            "completes a weight update: the default training step of a schedule",
        )
        for method in ("update_weights_from_disk", "update_weights_from_ipc", "end_weight_update")
    ),
)
