"""Checkpoints on disk: headers, indexes and listings (standard library only), lazy tensors and the writer (torch)."""
