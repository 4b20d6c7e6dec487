"""The official client, asynchronous: several answers, and their arrays."""

import asyncio

from openai import AsyncOpenAI


async def main() -> None:
    async with AsyncOpenAI() as client:
        answer = await client.completions.create(
            model="smollm2",
            prompt="The sea is salty because",
            max_tokens=24,
            n=2,
            extra_body={"annealing": {"preset": "paper", "warmup": 0, "step": 0}},
        )
    for choice in answer.choices:
        arrays = choice.rollout
        for token_id, tau, logprob in zip(
            arrays["token_ids"], arrays["temperatures"], arrays["logprobs"], strict=True
        ):
            print(f"{tau:.6f} {logprob:.4f} {token_id}")


asyncio.run(main())
