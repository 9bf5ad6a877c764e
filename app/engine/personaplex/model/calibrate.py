"""Keys made ready for a byte an element: channels of very different sizes are evened out, in the weights themselves."""

import torch
from torch import Tensor

from app.engine.personaplex.model.lm import Lm
from app.engine.personaplex.model.ring import Ring

_MOST_DOUBLINGS = 6


def even_keys(lm: Lm, inputs: Tensor) -> None:
    """Scale keys so that all channels of a head are about as large, and queries against it.

    A ring that keeps one scale for a token and head rounds small channels away beside large ones. How large a channel
    mostly is does not change from token to token, so that each gets a fixed scale; the two that RoPE turns into each
    other share one, which then holds at every position. The scales are powers of two and go into the weights that make
    keys and queries: without quantisation not a bit of what the model says changes.

    Args:
        lm: weights loaded, not packed.
        inputs: [T, D], of any prompt: what the model mostly meets.
    """
    lm.transformer.scale_keys(_scales(lm, inputs))


def _scales(lm: Lm, inputs: Tensor) -> Tensor:
    """Float32 [L, H, head_dim / 2]."""
    kv = Ring.of(lm.config, 1, len(inputs), lm.device, lm.dtype)
    lm.transformer.extend(inputs, kv, 0)
    pairs = kv.values[0, :, 0].to(torch.float32).unflatten(-1, (-1, 2))
    # Over positions the root mean square: the first tokens of a text are unlike all others.
    size = pairs.square().sum(-1).mean(2).clamp(min=torch.finfo(torch.float32).tiny).log2() / 2
    doublings = (size - size.mean(-1, keepdim=True)).round().clamp(-_MOST_DOUBLINGS, _MOST_DOUBLINGS)
    return torch.exp2(doublings)
