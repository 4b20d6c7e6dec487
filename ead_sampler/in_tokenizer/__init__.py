"""What runs in SGLang's tokenizer process: requests before the scheduler, answers after it."""
