"""The official client, streaming: every token with its temperature as it comes.

A stream's `logprobs` leave out tokens that have no text of their own yet; `rollout` has them all.
"""

from openai import OpenAI

client = OpenAI()
stream = client.chat.completions.create(
    model="smollm2",
    messages=[{"role": "user", "content": "Why is the sea salty?"}],
    max_tokens=24,
    stream=True,
    extra_body={"annealing": {"preset": "paper", "warmup": 0, "step": 0}},
)
for chunk in stream:
    for choice in chunk.choices:
        arrays = getattr(choice, "rollout", None)
        for index, token_id in enumerate(arrays["token_ids"] if arrays else ()):
            tau, logprob = arrays["temperatures"][index], arrays["logprobs"][index]
            print(f"{tau:.6f} {logprob:.4f} {token_id}", flush=True)
