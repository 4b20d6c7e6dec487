"""Pydantic AI: pip install 'pydantic-ai-slim[openai]'.

It keeps tokens and log-probabilities, but of no field that it does not know: temperatures are read
from the answer as it came.
"""

import httpx
from openai import AsyncOpenAI
from pydantic_ai import Agent, ModelSettings
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

answers = []


async def keep(response: httpx.Response) -> None:
    await response.aread()
    answers.append(response.json())


http = httpx.AsyncClient(event_hooks={"response": [keep]})
provider = OpenAIProvider(openai_client=AsyncOpenAI(http_client=http))
annealed = ModelSettings(
    max_tokens=24,
    extra_body={"annealing": {"preset": "paper", "warmup": 0, "step": 0}, "logprobs": True},
)
agent = Agent(OpenAIChatModel("smollm2", provider=provider), model_settings=annealed)
agent.run_sync("Why is the sea salty?")
for token in answers[0]["choices"][0]["logprobs"]["content"]:
    print(f"{token['temperature']:.6f} {token['logprob']:.4f} {token['token']!r}")
