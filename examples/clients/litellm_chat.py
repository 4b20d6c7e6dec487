"""litellm: pip install litellm. Fields that it does not know go into extra_body."""

import os

import litellm

answer = litellm.completion(
    model="openai/smollm2",
    api_base=os.environ["OPENAI_BASE_URL"],
    api_key=os.environ["OPENAI_API_KEY"],
    messages=[{"role": "user", "content": "Why is the sea salty?"}],
    max_tokens=24,
    logprobs=True,
    extra_body={"annealing": {"preset": "paper", "warmup": 0, "step": 0}},
)
for token in answer.choices[0].logprobs.content:
    print(f"{token.temperature:.6f} {token.logprob:.4f} {token.token!r}")
