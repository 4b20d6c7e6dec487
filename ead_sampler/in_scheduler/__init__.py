"""What runs in SGLang's scheduler process: rows of schedules, and each step of the sampler."""
