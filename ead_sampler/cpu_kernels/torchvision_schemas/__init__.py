"""Holds the `torchvision` that `use_torch_kernels` puts on `sys.path`; not imported itself."""
