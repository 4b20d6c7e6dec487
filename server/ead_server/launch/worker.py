"""SGLang's HTTP app with ours in it, for uvicorn workers that import their app by name.

Used with `--tokenizer-worker-num` > 1: those workers do not load SGLang's plugins themselves.
"""

from sglang.srt.plugins import load_plugins

from ead_sampler.defaults import join_shared_defaults

import sglang.srt.entrypoints.http_server  # isort: skip  (before the plugins: see _serves_http)

join_shared_defaults()
load_plugins()

app = sglang.srt.entrypoints.http_server.app
