"""What the extended SGLang process offers over HTTP, and the `ead` command line."""

import os

# Without a GPU, a server and a trainer share the cores, and threads that spin until the others of
# their process are done keep the other process from running: with GNU OpenMP's default a step of
# `rollout.staleness=1` takes three times as long (docs/numbers.md). OpenMP reads this when torch
# is loaded, which is after this package.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"
