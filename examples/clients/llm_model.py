"""Simon Willison's llm: pip install llm. A model whose every prompt is annealed.

llm itself has no place for fields that it does not know. As a plugin (`register_models`), this
class serves the `llm` command too; without it, `ead serve --annealing` anneals what llm asks.
"""

import os
from typing import Any

from llm.default_plugins.openai_models import Chat


class Annealed(Chat):
    needs_key = None

    def build_kwargs(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        kwargs = super().build_kwargs(*arguments, **keywords)
        schedule = {"preset": "paper", "warmup": 0, "step": 0}
        return {**kwargs, "logprobs": True, "extra_body": {"annealing": schedule}}


model = Annealed("annealed", model_name="smollm2", api_base=os.environ["OPENAI_BASE_URL"])
response = model.prompt("Why is the sea salty?", max_tokens=24, stream=False)
response.text()
for token in response.response_json["choices"][0]["logprobs"]["content"]:
    print(f"{token['temperature']:.6f} {token['logprob']:.4f} {token['token']!r}")
