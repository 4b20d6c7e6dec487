"""Names on the wire: of fields in a request, and of what is recorded of every token."""

ANNEALING = "annealing"
ROLLOUT = "rollout"
SAMPLING = "sampling"
# in custom_params: how many of the prompt's last tokens are the answer's beginning
CONTINUED = "continued"
# What the sampler records of every token, under these names in `meta_info` and in every answer.
COLUMNS = ("temperatures", "logprobs", "model_logprobs")
ENTROPIES = "entropies"
RECORDED = (*COLUMNS, ENTROPIES)
MARKERS = (ANNEALING, SAMPLING)  # added to meta_info of every answer that has the arrays
