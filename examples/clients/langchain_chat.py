"""LangChain: pip install langchain-openai. The numbers are in the message's response_metadata."""

from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model="smollm2",
    max_tokens=24,
    logprobs=True,
    extra_body={"annealing": {"preset": "paper", "warmup": 0, "step": 0}},
)
message = model.invoke("Why is the sea salty?")
for token in message.response_metadata["logprobs"]["content"]:
    print(f"{token['temperature']:.6f} {token['logprob']:.4f} {token['token']!r}")
