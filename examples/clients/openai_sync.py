"""The official client: pip install openai. OPENAI_BASE_URL names the server, as http://host:30000/v1."""

from openai import OpenAI

client = OpenAI()
answer = client.chat.completions.create(
    model="smollm2",
    messages=[{"role": "user", "content": "Why is the sea salty?"}],
    max_tokens=24,
    logprobs=True,
    extra_body={"annealing": {"preset": "paper", "warmup": 0, "step": 0}},
)
for token in answer.choices[0].logprobs.content:
    print(f"{token.temperature:.6f} {token.logprob:.4f} {token.token!r}")
