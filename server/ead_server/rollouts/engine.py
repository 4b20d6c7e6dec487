"""SGLang in this process, as `/v1/rollouts` uses it."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from pydantic_core import SchemaValidator, ValidationError

from ead_sampler.in_tokenizer.server_mode import check_generates
from ead_server.edge.bodies import check_text, max_text
from ead_server.edge.fail_fast import validator_of
from ead_server.errors import BadField, LimitExceeded, as_openai_error, place_of
from ead_server.json_types import Json
from ead_server.rollouts.request import Prompt

STILL_S = 300.0  # without a sign of the engine, after which it may have died


@cache
def _tokenize_request() -> SchemaValidator:
    """Reads what SGLang's route for tokenising takes; its own finds every mistake of a message."""
    from sglang.srt.entrypoints.openai.protocol import TokenizeRequest

    return validator_of(TokenizeRequest)


class Engine:
    """Raises FieldError if it embeds."""

    def __init__(self, app: Any) -> None:
        from sglang.srt.entrypoints.http_server import get_global_state

        self.app = app
        self.manager = get_global_state().tokenizer_manager
        check_generates(self.manager)

    def check_fits(self, token_ids: list[int]) -> None:
        """Raises LimitExceeded, before anything else looks at each token."""
        limit = self.manager.model_config.context_len
        if len(token_ids) >= limit:
            length = f"{len(token_ids):,} tokens are longer"
            message = f"{length} than the model's context length of {limit:,}, less one to answer"
            raise LimitExceeded("prompts", message)

    async def token_ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, as SGLang's own routes would make them. Raises ValueError."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        from sglang.srt.entrypoints.openai.protocol import TokenizeResponse

        if self.manager.tokenizer is None:
            raise BadField("prompts", "needs a tokenizer, which this server has not")
        raw = {"prompt": prompt.text, "messages": prompt.messages}
        check_text([prompt.text, prompt.messages], max_text(self.manager), "prompts")
        try:
            request = _tokenize_request().validate_python(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise BadField("prompts", f"{place_of(first['loc'])}: {first['msg']}") from None
        serving = self.app.state.openai_serving_tokenize
        answer = await serving.handle_request(request, None)
        if not isinstance(answer, TokenizeResponse):
            message = as_openai_error(getattr(answer, "body", b""))["error"]["message"]
            raise BadField("prompts", f"cannot be tokenised: {message[:500]}")
        return list(answer.tokens)

    def at_work(self) -> bool:
        """Whether answers may still come: generation is not paused, and the engine has been heard
        of lately (it sends what it has generated every 50 tokens)."""
        silent_s = time.time() - self.manager.last_receive_tstamp
        return not self.manager.is_pause and silent_s < STILL_S

    async def generate(self, token_ids: list[int], params: Json) -> Json:
        """One answer; cancelling this ends the generation in the engine."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        item = GenerateReqInput(input_ids=list(token_ids), sampling_params=dict(params))
        items = self.manager.generate_request(item)
        try:
            answer: Json = await anext(items)
        finally:
            await items.aclose()
        return answer
