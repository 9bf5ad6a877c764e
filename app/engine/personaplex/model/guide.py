"""Guided speech: words that the agent must say, put in where the model opens a word by itself.

Pauses stay the model's own: only a text token that is a word is replaced. With a limit on the silence before the
text, and on a silence in its middle, a start is forced as the model itself would write it: EPAD, then the word.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.personaplex.model.config import EPAD, PAD

CAPACITY = 1_024
"""Guided tokens that a row can hold at once: about five minutes of speech."""
STALL_FRAMES = 12
"""A text that has begun goes on at the latest after a second, where it had a limit to begin."""


@dataclass
class Guide:
    """What each row has still to say.

    `tokens` int64 [S, CAPACITY]; the first `taken` [S] of `length` [S] are said. `within` [S]: the silence, in frames,
    after which a start is forced; 0 for never. `quiet` [S]: frames since the last word.
    """

    tokens: Tensor
    taken: Tensor
    length: Tensor
    within: Tensor
    quiet: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> "Guide":
        counts = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(4)]
        return cls(torch.zeros(rows, CAPACITY, dtype=torch.int64, device=device), *counts)


def steer(guide: Guide, sampled: Tensor, before: Tensor, active: Tensor) -> Tensor:
    """The text token of the next position, int64 [S], and the guide moved on for active rows.

    Args:
        sampled: int64 [S], what the model would say.
        before: int64 [S], the text token of this position.
        active: bool [S].
    """
    pending = active & (guide.taken < guide.length)
    opens = (sampled != PAD) & (sampled != EPAD)
    # The EPAD of a forced start takes a frame of the silence that was allowed.
    due = pending & ~opens & (guide.within > 0) & (guide.quiet + 2 > guide.within)
    follows = due & ((before == EPAD) | (guide.within == 1))
    takes = pending & (opens | follows)
    word = guide.tokens.gather(1, guide.taken.clamp(max=CAPACITY - 1)[:, None])[:, 0]
    said = torch.where(takes, word, torch.where(due, torch.full_like(word, EPAD), sampled))
    guide.taken += takes
    guide.within.copy_(torch.where(takes & (guide.within > 0), STALL_FRAMES, guide.within))
    quiet = torch.where(opens | takes, 0, guide.quiet + 1)
    guide.quiet.copy_(torch.where(active, quiet, guide.quiet))
    return said
