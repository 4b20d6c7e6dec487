"""What the server touches in SGLang, in one table, as `ead_sampler.hooks`."""

from __future__ import annotations

from ead_sampler.hooks import Hook

HTTP_SERVER = "sglang.srt.entrypoints.http_server"
_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_GRAMMAR = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar"
_TOKENIZE = "sglang.srt.entrypoints.openai.serving_tokenize"
_HANDLE = "_handle_non_streaming_request"
_HANDLE_PARAMETERS = "self adapted_request request raw_request"

HOOKS = (
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
