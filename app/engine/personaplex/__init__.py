"""NVIDIA's PersonaPlex-7B in plain PyTorch: it listens and speaks at the same time, many calls as rows of one batch."""
