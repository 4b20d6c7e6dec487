"""Everything that this project touches in SGLang, in one table, checked at start-up.

SGLang finds `load` through the entry-point group `sglang.srt.plugins` and calls it in each of its
processes. Besides the hooks below, the HTTP layer adds ASGI middlewares and routes to SGLang's
FastAPI app (`ead_server.app`), and on a machine without an accelerator SGLang's CPU engine is
switched on (`ead_sampler.device`).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import multiprocessing
import os
import pkgutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

SUPPORTED_SGLANG = "0.5.23"
HTTP_SERVER = "sglang.srt.entrypoints.http_server"
_APP = "ead_server.app"


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
_GRAMMAR = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar"
_TOKENIZE = "sglang.srt.entrypoints.openai.serving_tokenize"
_HANDLE = "_handle_non_streaming_request"
_HANDLE_PARAMETERS = "self adapted_request request raw_request"

HOOKS = (
    # scheduler process: per-row state follows the batch (SGLang's placeholders for extension)
    Hook(
        f"{_BATCH}.adjusted_from_schedule_batch",
        "self batch vocab_size",
        "AFTER",
        "ead_sampler.sampling:build_rows",
        "a new batch gets a row of schedule parameters per request",
    ),
    Hook(
        f"{_BATCH}.adjusted_filter_batch",
        "self keep_indices keep_indices_device",
        "AFTER",
        "ead_sampler.sampling:filter_rows",
        "rows leave with finished requests",
    ),
    Hook(
        f"{_BATCH}.adjusted_merge_batch",
        "self other",
        "AFTER",
        "ead_sampler.sampling:merge_rows",
        "rows of prefilled requests join the running ones",
    ),
    Hook(
        f"{_BATCH}.copy_for_forward",
        "self",
        "AFTER",
        "ead_sampler.sampling:keep_rows",
        "the copy that a step in flight uses drops attributes that are not dataclass fields",
    ),
    # scheduler process: one sampling step
    Hook(
        f"{_RUNNER}._preprocess_logits",
        "self logits_output sampling_info observer",
        "BEFORE",
        "ead_sampler.sampling:keep_model_logprobs",
        "model log-probabilities are those before penalties, bias and grammar masks",
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler.forward",
        "self logits_output sampling_info return_logprob top_logprobs_nums token_ids_logprobs "
        "positions logprob_logits",
        "AROUND",
        "ead_sampler.sampling:sample",
        "sets each row's temperature, whatever the sampling backend, and records the outcome",
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler._sample_from_probs",
        "self probs sampling_info positions simple_sampling_case",
        "BEFORE",
        "ead_sampler.bad_numbers:mend_probabilities",
        "one row of NaN ends the server, with all that it was generating",
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler._sample_from_probs",
        "self probs sampling_info positions simple_sampling_case",
        "AROUND",
        "ead_sampler.seeds:draw",
        "a seed's tokens change when another request has top_p or top_k; min_p ends the server",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        "self batch result",
        "BEFORE",
        "ead_sampler.bad_numbers:end_bad_requests",
        "a request whose logits are no numbers would go on with some token",
    ),
    # scheduler process, a broadcast of weights
    Hook(
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
        ".receive_weights_from_distributed",
        "self names dtypes shapes group_name load_format",
        "AFTER",
        "ead_sampler.bad_numbers:check_received",
        "weights that are no numbers are refused before they are loaded",
    ),
    # scheduler process, at its start
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_model_worker",
        "self",
        "AFTER",
        "ead_sampler.sampling:seed_data_parallel_rank",
        "SGLang seeds all data-parallel ranks alike: answers of one group would repeat each other",
    ),
    # scheduler process: what a request may cost there
    Hook(
        "sglang.srt.managers.schedule_batch.Req._check_str_based_finish",
        "self new_accepted_len",
        "AROUND",
        "ead_server.edge.stop_regex:check_stops",
        "a stop_regex is searched by backtracking after every token: it may stop all requests",
    ),
    Hook(
        f"{_GRAMMAR}.fill_vocab_mask",
        "self vocab_mask idx",
        "AROUND",
        "ead_server.edge.grammars:fill_vocab_mask",
        "a grammar may take seconds for a token, or let none follow, which is no distribution",
    ),
    Hook(
        f"{_GRAMMAR}.accept_token",
        "self token",
        "AROUND",
        "ead_server.edge.grammars:accept_token",
        "where SGLang ends the request of a grammar that failed",
    ),
    Hook(
        "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend.set_cache",
        "self key value",
        "AFTER",
        "ead_server.edge.grammars:forget_oldest",
        "every grammar that was ever compiled is kept",
    ),
    # tokenizer process
    *(
        Hook(
            target,
            parameters,
            "AROUND",
            "ead_server.edge.tokenization:in_a_thread",
            "a long text is tokenised on the event loop: nobody is answered meanwhile",
        )
        for target, parameters in (
            (f"{_MANAGER}._tokenize_texts", "self texts is_cross_encoder"),
            (f"{_TOKENIZE}.OpenAIServingTokenize.{_HANDLE}", _HANDLE_PARAMETERS),
        )
    ),
    Hook(
        f"{_TOKENIZE}.OpenAIServingDetokenize.{_HANDLE}",
        _HANDLE_PARAMETERS,
        "AROUND",
        "ead_server.edge.tokenization:detokenize",
        "a token id that the model has not is an error of the server; and as above",
    ),
    Hook(
        "sglang.srt.sampling.sampling_params.SamplingParams.verify",
        "self vocab_size",
        "AFTER",
        "ead_sampler.requests:verify_sampling_params",
        "a bad schedule is a 400 on every route instead of a dead scheduler",
    ),
    Hook(
        f"{_MANAGER}.generate_request",
        "self obj request",
        "AROUND",
        "ead_sampler.requests:generate_request",
        "`annealing` travels in custom_params; answers say what was applied",
    ),
    Hook(
        f"{_MANAGER}.generate_request",
        "self obj request",
        "AROUND",
        "ead_server.edge.limits:generate_request",
        "`ead serve`'s limits, request ids and counts, whatever the route",
    ),
    Hook(
        f"{_MANAGER}._validate_one_request",
        "self obj input_ids",
        "BEFORE",
        "ead_server.edge.limits:refuse_empty_prompt",
        "a prompt of no tokens kills the scheduler",
    ),
    Hook(
        f"{_MANAGER}.update_request_meta_info",
        "self meta_info state customized_info index finish_reason",
        "AROUND",
        "ead_sampler.requests:drop_empty_columns",
        "requests that asked for nothing must not grow columns of None",
    ),
    Hook(
        f"{_MANAGER}._handle_abort_req",
        "self recv_obj",
        "AROUND",
        "ead_sampler.requests:keep_columns_of_aborted",
        "an answer that is aborted while it waits, after a retraction, keeps what was recorded",
    ),
    *(
        Hook(
            f"{_MANAGER}.{method}",
            "self obj request",
            "AROUND",
            "ead_sampler.requests:count_weight_update",
            "completes a weight update: the default training step of a schedule",
        )
        for method in ("update_weights_from_disk", "update_weights_from_ipc", "end_weight_update")
    ),
    Hook(
        f"{_MANAGER}.update_weights_from_disk",
        "self obj request",
        "AROUND",
        "ead_server.weights.hooks:update_from_disk",
        "SGLang takes what is missing, unknown or no number, and keeps the old version's name",
    ),
    Hook(
        f"{_MANAGER}.pause_generation",
        "self obj",
        "AROUND",
        "ead_server.weights.hooks:pause_generation",
        "one client that stops reading would hold up every pause, and all calls behind it",
    ),
    Hook(
        f"{_MANAGER}.flush_cache",
        "self timeout_s",
        "AROUND",
        "ead_server.weights.hooks:flush_cache",
        "a data-parallel rank that was not flushed would go on with old keys and values",
    ),
    # HTTP process
    Hook(
        "sglang.srt.utils.auth.add_api_key_middleware",
        "app api_key admin_api_key",
        "AROUND",
        "ead_server.launch.serve:add_api_key_middleware",
        "under `ead serve` the keys are checked by ead_server.edge.guard",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.SignalHandler.sigterm_handler",
        "self signum frame",
        "AFTER",
        "ead_server.lifecycle.shutdown:sigterm",
        "SGLang waits for the answers in progress without end",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.SignalHandler.running_phase_sigquit_handler",
        "self signum frame",
        "AROUND",
        "ead_server.lifecycle.shutdown:sigquit",
        "SGLang ends, when its engine is gone, before the last of its processes is",
    ),
    Hook(
        f"{_MANAGER}.sigterm_watchdog",
        "self",
        "AROUND",
        "ead_server.lifecycle.shutdown:drain",
        "the first of several tokenizer workers to be done would stop the scheduler for all",
    ),
    Hook(
        f"{HTTP_SERVER}._wait_and_warmup",
        "server_args launch_callback execute_warmup_func post_warmup_callback",
        "AROUND",
        "ead_server.launch.serve:warm_up",
        "SGLang's own first requests carry a key: a server that refuses them is killed by SGLang",
    ),
)


def load() -> None:
    """Entry point: register the hooks. It is in every environment that has any part of ead.

    An SGLang that cannot be extended starts as it is, with one loud warning, unless annealing was
    asked for, by `ead serve`, REQUIRED or a default schedule: then this process stops with the
    reason. SGLang only logs an exception of a plugin and would then serve without annealing,
    silently; hence SystemExit.
    """
    serves_http = _serves_http()  # before our checks, which import all of SGLang
    problems = _foreign() or _cannot_import()
    if not problems:
        from ead_sampler import device

        logger.info("device: %s", device.choose())
        problems = check_sglang()
    if problems:
        _leave_unextended(problems)
        return
    if problems := _bad_default():
        raise SystemExit(f"ead: {problems[0]}")
    _extend(serves_http=serves_http)


def _extend(*, serves_http: bool) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ead_sampler.defaults import shared_defaults

    # all of them found before the first is registered: whole, or not at all
    found = [(hook, _resolve(hook.ours)) for hook in HOOKS]
    for hook, ours in found:
        HookRegistry.register(hook.target, ours, HookType[hook.kind])
    if serves_http:
        importlib.import_module(_APP).install()
        shared_defaults()  # made here, before any worker process that shares it
        # With several tokenizer workers, uvicorn imports its app by this name in each of them.
        os.environ.setdefault("SGLANG_HTTP_SERVER_APP_PATH", "ead_server.launch.worker:app")
    if _SERVED in os.environ and multiprocessing.parent_process() is not None:
        watch = importlib.import_module("ead_server.lifecycle.watch")
        watch.start_in_engine()
        if not serves_http:
            watch.ignore_what_is_for_the_main_process()


# --- may it be extended? ----------------------------------------------------------------------

REQUIRED = "EAD_REQUIRE"  # environment: "1" stops an SGLang that cannot be extended
_SERVED = "EAD_SETTINGS"  # environment: set by `ead serve` alone, see ead_server.settings
_DEFAULT_ANNEALING = "EAD_ANNEALING"  # environment: see ead_sampler.defaults
_TOLD = "EAD_TOLD_UNEXTENDED"  # environment: the warning has been given, in this process's family


def _leave_unextended(problems: list[str]) -> None:
    environ = os.environ
    asked = environ.get(REQUIRED, "").lower() in _TRUE or _SERVED in environ
    if asked or environ.get(_DEFAULT_ANNEALING, "").strip():
        raise SystemExit("ead cannot extend this SGLang:\n  " + "\n  ".join(problems))
    if _TOLD not in environ:
        environ[_TOLD] = "1"
        print(
            f"ead: WARNING: SGLang starts without ead: {'; '.join(problems)}. `annealing` and "
            "`rollout` in requests are ignored, and /v1/rollouts, /v1/annealing and /v1/weights do "
            f"not exist. {REQUIRED}=1 stops it instead; SGLANG_PLUGINS=none silences this.",
            file=sys.stderr,
            flush=True,
        )


def check_sglang() -> list[str]:
    """What is wrong with the installed SGLang, hook by hook; empty when all is as expected."""
    return _foreign() or [problem for hook in HOOKS if (problem := _check(hook))]


def _foreign() -> list[str]:
    """Whether this is another SGLang than ours: found without importing it, or anything heavy."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return [f"sglang is not installed; ead supports sglang {SUPPORTED_SGLANG}"]
    if found != SUPPORTED_SGLANG:
        return [f"found sglang {found}; this version of ead supports sglang {SUPPORTED_SGLANG}"]
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in _TRUE:
        return ["SGLANG_RUST_SERVER replaces the HTTP server that ead extends; unset it"]
    return []


_TRUE = ("1", "true", "yes", "y")  # as SGLang reads them


def _cannot_import() -> list[str]:
    """What our own modules need and this environment lacks."""
    try:
        for module in sorted({_APP, *(hook.ours.partition(":")[0] for hook in HOOKS)}):
            importlib.import_module(module)
    except ImportError as error:
        return [f"this environment lacks what ead[server] needs ({error})"]
    return []


def _bad_default() -> list[str]:
    from ead_sampler.defaults import default_annealing
    from ead_sampler.schedule import AnnealingError

    try:
        default_annealing()
    except AnnealingError as error:
        return [f"{_DEFAULT_ANNEALING} (ead serve --annealing): {error}"]
    return []


def hooks_not_in_place() -> list[str]:
    """Targets that are not wrapped in this process, after SGLang has loaded its plugins."""
    missing = []
    for hook in HOOKS:
        wrappers, ours = _resolve(hook.target), _resolve(hook.ours)
        while wrappers is not None and not _closes_over(wrappers, ours):
            wrappers = getattr(wrappers, "__wrapped__", None)
        if wrappers is None:
            missing.append(hook.target)
    return missing


def _check(hook: Hook) -> str | None:
    try:
        target = _resolve(hook.target)
    except (ImportError, AttributeError) as error:
        return f"{hook.target} is gone ({error}); it is needed because {hook.why}"
    names = " ".join(inspect.signature(target).parameters)
    if names != hook.parameters:
        return f"{hook.target} takes ({names}), expected ({hook.parameters})"
    return None


def _resolve(name: str) -> Any:
    return pkgutil.resolve_name(name)


def _closes_over(wrapper: Any, function: Any) -> bool:
    """Whether `wrapper` is SGLang's wrapping of `function`."""
    cells = getattr(wrapper, "__closure__", None) or ()
    return any(cell.cell_contents is function for cell in cells)


def _serves_http() -> bool:
    """Whether this process may run the HTTP server: the launcher, or one that imported it.

    Trainers start servers in child processes, and load the HTTP module before the plugins; the
    scheduler and detokenizer processes never load it.
    """
    return multiprocessing.parent_process() is None or HTTP_SERVER in sys.modules
