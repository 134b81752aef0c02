"""Flat TorchRec, its towers and ours on an emulated cluster; needs root or user namespaces."""
