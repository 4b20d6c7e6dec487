"""Errors on their way out of a middleware, ours and SGLang's, as OpenAI's clients expect them."""

from __future__ import annotations

import orjson

from ead_server.asgi import Message, Send, send_json
from ead_server.errors import RequestRefused, as_openai_error, body_of


async def send_refusal(send: Send, refused: RequestRefused) -> None:
    """The whole answer to a request that is refused before any route has it."""
    await send_json(send, refused.status, body_of(refused), refused.headers)


class OpenAIErrors:
    """A `send` that turns SGLang's error bodies into OpenAI's shape and leaves the rest alone."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message = {}
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            if message["status"] < 400:
                await self.send(message)
        elif self.start.get("status", 200) < 400:
            await self.send(message)
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._answer(message)

    async def _answer(self, last: Message) -> None:
        if _is_sglangs(self.body):
            error = as_openai_error(self.body)
            await send_json(self.send, self.start["status"], error, self.start["headers"])
        else:
            await self.send(self.start)
            await self.send({**last, "body": self.body})


def _is_sglangs(body: bytes) -> bool:
    """And no other dialect's, nor what a route says in words of its own ({"success": false})."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else None
    return isinstance(error, dict) and error.get("object") == "error"
