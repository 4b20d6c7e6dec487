"""What the extended SGLang process offers over HTTP, and the `ead` command line."""
