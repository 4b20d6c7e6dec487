"""The policy that is trained, batches of answers for it, and an update on one process or more."""
