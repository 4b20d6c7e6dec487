"""Instructor: pip install instructor. An answer of a given shape, sampled by a schedule."""

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    salty: bool
    why: Literal["rivers", "rocks", "nobody knows"]


client = instructor.from_openai(OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
verdict, answer = client.chat.completions.create_with_completion(
    model="smollm2",
    messages=[{"role": "user", "content": "Is the sea salty, and why?"}],
    response_model=Verdict,
    max_tokens=200,
    logprobs=True,
    extra_body={"annealing": {"preset": "paper", "warmup": 0, "step": 0}},
)
print(f"# {verdict!r}")
for token in answer.choices[0].logprobs.content:
    print(f"{token.temperature:.6f} {token.logprob:.4f} {token.token!r}")
