"""Mimi, the codec: 80 ms of sound to eight codes and back, every row a stream of its own. Float32 on every device."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.personaplex.model import seanet
from app.engine.personaplex.model.codec_transformer import CodecTransformer
from app.engine.personaplex.model.config import MimiConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.rvq import Quantizer
from app.engine.personaplex.model.seanet import Carry, Conv, overlap_add


@dataclass
class EncoderState:
    """`carry` float32 [S, N], what the convolutions keep; `kv` float32 [S, L, 2, H, ring, head_dim]; `position` int64
    [S], steps of the transformer so far. A row of zeros is a new stream.
    """

    carry: Tensor
    kv: Tensor
    position: Tensor


@dataclass
class DecoderState:
    """As `EncoderState`, of the way back."""

    carry: Tensor
    kv: Tensor
    position: Tensor


@dataclass
class MimiState:
    encoder: EncoderState
    decoder: DecoderState


class Mimi:
    """Built empty: fill `entries()`, then call `pack` once. Nothing waits for the device, every shape is fixed and
    states change in place, so a step can be captured in a CUDA graph. Engine thread only.

    Source: Moshi, arXiv:2410.00037, section 3.3.
    """

    def __init__(self, config: MimiConfig, device: torch.device) -> None:
        self.config = config
        self._device = device
        self._encoder = seanet.encoder(config, device)
        self._encoder_transformer = CodecTransformer("encoder_transformer", config, device)
        self._downsample = Conv(
            config.dimension, config.dimension, 2 * config.downsample, config.downsample, device=device, bias=False
        )
        self._quantizer = Quantizer(config, device)
        self._upsample = _Upsample(config, device)
        self._decoder_transformer = CodecTransformer("decoder_transformer", config, device)
        self._decoder = seanet.decoder(config, device)

    def entries(self) -> dict[str, Entry]:
        return {
            **self._encoder.entries(),
            **self._encoder_transformer.entries(),
            **self._downsample.entries("downsample.conv"),
            **self._quantizer.entries(),
            **self._upsample.entries("upsample.convtr"),
            **self._decoder_transformer.entries(),
            **self._decoder.entries(),
        }

    def pack(self) -> None:
        """Once, after loading: lay the weights out for use."""
        for part in (self._encoder, self._encoder_transformer, self._downsample, self._quantizer, self._upsample,
                     self._decoder_transformer, self._decoder):  # fmt: skip
            part.pack()

    def state(self, rows: int) -> MimiState:
        """New streams."""

        def position() -> Tensor:
            return torch.zeros(rows, dtype=torch.int64, device=self._device)

        def carry(floats: int) -> Tensor:
            return torch.zeros(rows, floats, device=self._device)

        return MimiState(
            EncoderState(
                carry(self._encoder.kept + self._downsample.kept), self._encoder_transformer.kv(rows), position()
            ),
            DecoderState(
                carry(self._upsample.kept + self._decoder.kept), self._decoder_transformer.kv(rows), position()
            ),
        )

    def encode(self, state: MimiState, pcm: Tensor, active: Tensor) -> Tensor:
        """The next frame of every active row.

        Args:
            state: its encoder half moves on.
            pcm: float32 [S, 1920], 24 kHz.
            active: bool [S]. Another row's pcm may be anything, and its codes mean nothing.

        Returns:
            int64 [S, 8].
        """
        return self._quantizer.encode(self.latent(state, pcm, active))

    def latent(self, state: MimiState, pcm: Tensor, active: Tensor) -> Tensor:
        """What `encode` quantizes: float32 [S, D]."""
        now = state.encoder
        carry = Carry(now.carry)
        x = self._encoder(pcm[..., None], carry)
        x = self._encoder_transformer(x, now.kv, now.position)
        x = self._downsample(x, carry, fresh=now.position == 0)
        carry.move_on(active)
        now.position.add_(active, alpha=self.config.downsample)
        return x[:, 0]

    def decode(self, state: MimiState, codes: Tensor, active: Tensor) -> Tensor:
        """The next frame of every active row.

        Args:
            state: its decoder half moves on.
            codes: int64 [S, 8].
            active: bool [S]. Another row's codes may be anything, and its sound means nothing.

        Returns:
            float32 [S, 1920], 24 kHz, beyond [-1, 1] where the decoder goes there.
        """
        now = state.decoder
        carry = Carry(now.carry)
        x = self._quantizer.decode(torch.where(active[:, None], codes, 0))
        x = self._upsample(x[:, None], carry)
        x = self._decoder_transformer(x, now.kv, now.position)
        x = self._decoder(x, carry)
        carry.move_on(active)
        now.position.add_(active, alpha=self.config.downsample)
        return x[..., 0]

    def encode_whole(self, pcm: Tensor) -> Tensor:
        """A recording, as a stream would be encoded: float32 [N], at least a sample -> int64 codes [8, T].

        Silence completes the last frame.
        """
        missing = -len(pcm) % self.config.frame_samples
        frames = functional.pad(pcm.to(self._device), (0, missing)).view(-1, 1, self.config.frame_samples)
        state, active = self.state(1), torch.ones(1, dtype=torch.bool, device=self._device)
        return torch.cat([self.encode(state, frame, active) for frame in frames]).T


class _Upsample:
    """Each latent to `downsample` steps, every channel by itself: [S, 1, D] -> [S, 2, D]."""

    def __init__(self, config: MimiConfig, device: torch.device) -> None:
        self.kept = config.downsample * config.dimension
        self._weight = torch.empty(config.dimension, 1, 2 * config.downsample, device=device)

    def entries(self, place: str) -> dict[str, Entry]:
        return {f"{place}.convtr.convtr.weight": Entry(tuple(self._weight.shape), self._weight)}

    def pack(self) -> None:
        self._weight = self._weight[:, 0].T.contiguous()

    def __call__(self, x: Tensor, carry: Carry) -> Tensor:
        reached = (x[:, :, None] * self._weight).flatten(2)
        return overlap_add(reached, carry).view(len(x), -1, x.shape[-1])
