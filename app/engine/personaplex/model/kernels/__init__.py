"""Kernels in Triton for NVIDIA's GPUs, and the only room that imports Triton: a module at a time, where one is used.

Each has a plain twin in torch, which serves a CPU and which the tests hold it against.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch


def available(device: torch.device) -> bool:
    """Whether the kernels run on this device: on a GPU where Triton is installed, or anywhere in its interpreter."""
    return (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
