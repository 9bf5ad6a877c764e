"""The sizes of the networks: PersonaPlex-7B's and Mimi's own by default, others from a checkpoint's `config.json`.

The keys are those of Kyutai's and NVIDIA's published configurations. No torch here: `doctor` reckons with these.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from app.engine.contract import EngineFault

CODEBOOKS = 8
"""Of each side, agent and user: what Mimi makes of a frame here."""
COLUMN_ROWS = 1 + 2 * CODEBOOKS
"""Tokens of one position: text, the agent's codebooks, the user's codebooks."""
PAD, EPAD = 3, 0
"""Text tokens that are no words: nothing is said, and a word is about to begin."""

_FIXED: Mapping[str, Any] = {
    "n_q": 2 * CODEBOOKS,
    "causal": True,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "layer_scale": None,
    "existing_text_padding_id": PAD,
    "delays": [0, 0, *[1] * (CODEBOOKS - 1), 0, *[1] * (CODEBOOKS - 1)],
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_multi_linear": True,
    "depformer_weights_per_step": True,
    "depformer_layer_scale": None,
}
_FIXED_MIMI: Mapping[str, Mapping[str, Any]] = {
    "seanet": {
        "channels": 1, "causal": True, "n_residual_layers": 1, "activation": "ELU", "norm": "none",
        "pad_mode": "constant", "true_skip": True,
    },
    "transformer": {
        "causal": True, "conv_layout": True, "gating": "none", "norm": "layer_norm", "positional_embedding": "rope",
    },
}  # fmt: skip


def gated_hidden(dim: int, feedforward: int) -> int:
    """The width inside a gated feed-forward block, by Moshi's rule."""
    return (21 * dim) // 8 if feedforward == 4 * dim else (2 * feedforward) // 3


@dataclass(frozen=True)
class LmConfig:
    """The temporal transformer and the depformer. Source: Moshi, arXiv:2410.00037, and PersonaPlex's checkpoint."""

    dim: int = 4096
    num_heads: int = 32
    num_layers: int = 32
    hidden_scale: float = 4.125
    context: int = 3000
    max_period: float = 10_000.0
    text_card: int = 32_000
    card: int = 2048
    dep_q: int = 16
    depformer_dim: int = 1024
    depformer_num_heads: int = 16
    depformer_num_layers: int = 6
    depformer_dim_feedforward: int = 4224
    silence_tokens: tuple[int, ...] = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
    sine_tokens: tuple[int, ...] = (430, 1268, 381, 1611, 1095, 1495, 56, 472)
    silence_frames: int = 6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise EngineFault(f"config: dim {self.dim} over {self.num_heads} heads; an even width a head is right")
        if self.depformer_dim % self.depformer_num_heads:
            found = f"depformer_dim {self.depformer_dim} over {self.depformer_num_heads} heads"
            raise EngineFault(f"config: {found}; a whole width a head is right")
        if self.dep_q < CODEBOOKS or self.context < 2:
            found = f"dep_q {self.dep_q}, context {self.context}"
            raise EngineFault(f"config: {found}; at least {CODEBOOKS} depformer steps and 2 positions are right")
        for name in ("silence_tokens", "sine_tokens"):
            tokens = getattr(self, name)
            if len(tokens) != CODEBOOKS or not all(0 <= token < self.card for token in tokens):
                raise EngineFault(f"config: {name} {tokens}; {CODEBOOKS} codes below card {self.card} are right")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def hidden(self) -> int:
        return gated_hidden(self.dim, int(self.hidden_scale * self.dim))

    @property
    def ring(self) -> int:
        """Slots of the ring cache. One less than `context`: the reference masks its oldest slot, once it is full."""
        return self.context - 1

    @property
    def depformer_hidden(self) -> int:
        return gated_hidden(self.depformer_dim, self.depformer_dim_feedforward)

    @property
    def text_initial(self) -> int:
        return self.text_card

    @property
    def audio_initial(self) -> int:
        return self.card

    @classmethod
    def of(cls, values: Mapping[str, Any], place: str = "config.json") -> "LmConfig":
        """From published keys; missing ones are PersonaPlex-7B's.

        Raises:
            EngineFault: a size that cannot be, or a kind of network that this one is not. Names `place` and the key.
        """
        for key, right in _FIXED.items():
            _same(place, key, values.get(key, right), right)
        known = {f.name for f in fields(cls)}
        given = {key: _typed(place, key, value) for key, value in values.items() if key in known}
        try:
            return cls(**given)
        except EngineFault as error:
            raise EngineFault(f"{place}: {error}") from error


@dataclass(frozen=True)
class MimiConfig:
    """The codec. Source: Moshi, arXiv:2410.00037, section 3.3, and Mimi's checkpoint."""

    ratios: tuple[int, ...] = (8, 6, 5, 4)
    n_filters: int = 64
    dimension: int = 512
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    compress: int = 2
    d_model: int = 512
    num_heads: int = 8
    num_layers: int = 8
    context: int = 250
    max_period: float = 10_000.0
    dim_feedforward: int = 2048
    codebook_dim: int = 256
    codebooks_in_file: int = 32
    bins: int = 2048
    downsample: int = 2
    """Latents of the encoder that make one code frame."""

    @property
    def frame_samples(self) -> int:
        return prod(self.ratios) * self.downsample

    @property
    def ring(self) -> int:
        """Slots of the ring cache: one less than `context`, as in the language model."""
        return self.context - 1

    @classmethod
    def of(cls, values: Mapping[str, Any], place: str = "config.json") -> "MimiConfig":
        """From the published groups `seanet`, `transformer` and `quantizer`; missing keys are Mimi's own.

        Raises EngineFault.
        """
        for group, rights in _FIXED_MIMI.items():
            for key, right in rights.items():
                _same(place, f"{group}.{key}", values.get(group, {}).get(key, right), right)
        quantizer = values.get("quantizer", {})
        renamed = {"codebook_dim": "dimension", "codebooks_in_file": "n_q", "bins": "bins"}
        flat = {**values.get("seanet", {}), **values.get("transformer", {})}
        flat |= {name: quantizer[key] for name, key in renamed.items() if key in quantizer}
        known = {f.name for f in fields(cls)}
        return cls(**{key: _typed(place, key, value) for key, value in flat.items() if key in known})


def read_configs(file: Path) -> tuple[LmConfig, MimiConfig]:
    """The sizes that a checkpoint's `config.json` names: the language model's keys, Mimi's groups under `mimi`.

    A file that is missing or names none (NVIDIA's is such a stub) means the real sizes.

    Raises EngineFault.
    """
    if not file.is_file():
        return LmConfig(), MimiConfig()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EngineFault(f"{file}: cannot be read: {error}; download it again") from error
    if not isinstance(values, dict) or not isinstance(values.get("mimi", {}), dict):
        raise EngineFault(f"{file}: not a block of keys; download it again")
    return LmConfig.of(values, str(file)), MimiConfig.of(values.get("mimi", {}), str(file))


def _same(place: str, key: str, found: object, right: object) -> None:
    if found != right:
        raise EngineFault(f"{place}: {key} is {found!r}; only {right!r} is supported")


def _typed(place: str, key: str, value: object) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EngineFault(f"{place}: {key} is {value!r}; a number is right")
    return value
