"""Where the tensors of a checkpoint go: each network names its own, and the loader streams them there."""

from dataclasses import dataclass

from torch import Tensor

from app.engine.personaplex.model.quantize import Quantized


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    `shape` is what the file must hold. `into`, already on its device, takes the first `rows` of axis 0 (all of them
    when None), reshaped to its own shape and cast to its own dtype, or quantised. `into` None: known, checked, never
    read.
    """

    shape: tuple[int, ...]
    into: Tensor | Quantized | None
    rows: int | None = None
