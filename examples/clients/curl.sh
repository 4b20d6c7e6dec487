# curl; Python only prints. OPENAI_BASE_URL names the server, as http://host:30000/v1
curl --silent --show-error --fail-with-body "$OPENAI_BASE_URL/chat/completions" \
  --header "Authorization: Bearer $OPENAI_API_KEY" \
  --json '{
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Why is the sea salty?"}],
    "max_tokens": 24,
    "logprobs": true,
    "annealing": {"preset": "paper", "warmup": 0, "step": 0}
  }' |
  python3 -c '
import json, sys

for token in json.load(sys.stdin)["choices"][0]["logprobs"]["content"]:
    print("{temperature:.6f} {logprob:.4f} {token!r}".format(**token))'
