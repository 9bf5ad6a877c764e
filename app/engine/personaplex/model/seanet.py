"""SEANet: the convolutions on both ends of Mimi, frame by frame, every row with its own past.

Activations are [S, T, channels]. A convolution's windows then lie in memory as rows, and the convolution is one
matrix: with frames this short that is several times faster than convolution kernels are. Source: Moshi,
arXiv:2410.00037, section 3.3, and Mimi's checkpoint.
"""

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from app.engine.personaplex.model.config import MimiConfig
from app.engine.personaplex.model.entries import Entry
from app.engine.personaplex.model.linear import SEVERAL, Linear


class Carry:
    """What the layers of one network keep from frame to frame, part by part in the order in which they run.

    Made for one step, handed through the layers, ended with `move_on`: until then nothing kept changes.
    """

    def __init__(self, kept: Tensor) -> None:
        """`kept` float32 [S, N]. All zeros is a new stream."""
        self._kept = kept
        self._taken = 0
        self._parts: list[Tensor] = []

    def take(self, steps: int, channels: int) -> Tensor:
        start, self._taken = self._taken, self._taken + steps * channels
        return self._kept[:, start : self._taken].view(-1, steps, channels)

    def put(self, part: Tensor) -> None:
        """What takes the place of the part taken last."""
        self._parts.append(part.flatten(1))

    def move_on(self, active: Tensor) -> None:
        """`active` bool [S]. The other rows keep what they had."""
        self._kept.copy_(torch.where(active[:, None], torch.cat(self._parts, 1), self._kept))


class Layer(Protocol):
    kept: int
    """Floats of a Carry that it takes and puts, a row."""

    def entries(self, place: str) -> dict[str, Entry]: ...

    def pack(self) -> None: ...

    def __call__(self, x: Tensor, carry: Carry) -> Tensor: ...


class Conv:
    """A causal convolution: [S, T, inputs] -> [S, T / stride, outputs]. Carries its last `kernel - stride` inputs."""

    _matrix: Linear

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, device: torch.device, bias: bool = True
    ) -> None:
        self._kernel, self._stride = kernel, stride
        self._past = (kernel - stride, inputs)
        self.kept = (kernel - stride) * inputs
        self._weight = torch.empty(outputs, inputs, kernel, device=device)
        self._bias = torch.empty(outputs, device=device) if bias else None

    def entries(self, place: str) -> dict[str, Entry]:
        named = {f"{place}.conv.conv.weight": Entry(tuple(self._weight.shape), self._weight)}
        if self._bias is not None:
            named[f"{place}.conv.conv.bias"] = Entry(tuple(self._bias.shape), self._bias)
        return named

    def pack(self) -> None:
        self._matrix = Linear(self._weight.transpose(1, 2).flatten(1))
        self._matrix.pack(SEVERAL)
        del self._weight

    def __call__(self, x: Tensor, carry: Carry, fresh: Tensor | None = None) -> Tensor:
        """`fresh` bool [S]: rows whose stream begins here, after their first step repeated and not after silence."""
        steps, channels = self._past
        if steps:
            past = carry.take(steps, channels)
            if fresh is not None:
                past = torch.where(fresh[:, None, None], x[:, :1], past)
            x = torch.cat((past, x), 1)
            carry.put(x[:, -steps:])
            x = x.unfold(1, self._kernel, self._stride).transpose(2, 3).flatten(2)
        y = self._matrix(x)
        return y if self._bias is None else y.add_(self._bias)


class TransposedConv:
    """A causal transposed convolution, its kernel twice its stride: [S, T, inputs] -> [S, T * stride, outputs]."""

    _matrix: Linear

    def __init__(self, inputs: int, outputs: int, stride: int, device: torch.device) -> None:
        self.kept = stride * outputs
        self._weight = torch.empty(inputs, outputs, 2 * stride, device=device)
        self._bias = torch.empty(outputs, device=device)

    def entries(self, place: str) -> dict[str, Entry]:
        return {
            f"{place}.convtr.convtr.weight": Entry(tuple(self._weight.shape), self._weight),
            f"{place}.convtr.convtr.bias": Entry(tuple(self._bias.shape), self._bias),
        }

    def pack(self) -> None:
        self._matrix = Linear(self._weight.permute(2, 1, 0).flatten(0, 1))
        self._matrix.pack(SEVERAL)
        del self._weight

    def __call__(self, x: Tensor, carry: Carry) -> Tensor:
        y = overlap_add(self._matrix(x), carry)
        return y.view(len(x), -1, len(self._bias)).add_(self._bias)


def overlap_add(reached: Tensor, carry: Carry) -> Tensor:
    """Sum what falls on the same samples: half of what a step reaches are its own, half are the next step's.

    `reached` [S, T, 2 * N] -> [S, T, N]. Carries the half that is the next frame's.
    """
    own, after = reached.chunk(2, -1)
    before = carry.take(1, own.shape[-1])
    carry.put(after[:, -1:])
    return torch.cat((before, after[:, :-1]), 1).add_(own)


class Residual:
    """x plus what two convolutions, with fewer channels between them, make of it. Changes x."""

    def __init__(self, width: int, config: MimiConfig, device: torch.device) -> None:
        between = width // config.compress
        self._narrow = Conv(width, between, config.residual_kernel_size, device=device)
        self._widen = Conv(between, width, 1, device=device)
        self.kept = self._narrow.kept

    def entries(self, place: str) -> dict[str, Entry]:
        return self._narrow.entries(f"{place}.block.1") | self._widen.entries(f"{place}.block.3")

    def pack(self) -> None:
        self._narrow.pack()
        self._widen.pack()

    def __call__(self, x: Tensor, carry: Carry) -> Tensor:
        between = self._narrow(functional.elu(x), carry)
        return x.add_(self._widen(functional.elu_(between), carry))


class Elu:
    """Changes x."""

    kept = 0

    def entries(self, place: str) -> dict[str, Entry]:
        return {}

    def pack(self) -> None:
        pass

    def __call__(self, x: Tensor, carry: Carry) -> Tensor:
        return functional.elu_(x)


class Chain:
    """Layers one after another, in the checkpoint under their numbers."""

    def __init__(self, place: str, layers: list[Layer]) -> None:
        self._layers = {f"{place}.{index}": layer for index, layer in enumerate(layers)}
        self.kept = sum(layer.kept for layer in layers)

    def entries(self) -> dict[str, Entry]:
        return {key: entry for place, layer in self._layers.items() for key, entry in layer.entries(place).items()}

    def pack(self) -> None:
        for layer in self._layers.values():
            layer.pack()

    def __call__(self, x: Tensor, carry: Carry) -> Tensor:
        for layer in self._layers.values():
            x = layer(x, carry)
        return x


def encoder(config: MimiConfig, device: torch.device) -> Chain:
    """Samples to latents: [S, 1920, 1] -> [S, 2, D] at Mimi's sizes."""
    widths = _widths(config)
    layers: list[Layer] = [Conv(1, widths[0], config.kernel_size, device=device)]
    for (width, wider), stride in zip(pairwise(widths), reversed(config.ratios), strict=True):
        layers += [Residual(width, config, device), Elu(), Conv(width, wider, 2 * stride, stride, device=device)]
    layers += [Elu(), Conv(widths[-1], config.dimension, config.last_kernel_size, device=device)]
    return Chain("encoder.model", layers)


def decoder(config: MimiConfig, device: torch.device) -> Chain:
    """Latents to samples: [S, 2, D] -> [S, 1920, 1] at Mimi's sizes. Nothing keeps the samples within [-1, 1]."""
    widths = _widths(config)[::-1]
    layers: list[Layer] = [Conv(config.dimension, widths[0], config.kernel_size, device=device)]
    for (width, narrower), stride in zip(pairwise(widths), config.ratios, strict=True):
        layers += [Elu(), TransposedConv(width, narrower, stride, device), Residual(narrower, config, device)]
    layers += [Elu(), Conv(widths[-1], 1, config.last_kernel_size, device=device)]
    return Chain("decoder.model", layers)


def _widths(config: MimiConfig) -> list[int]:
    """Channels next to the samples, and after each stride on the way to the latents."""
    return [config.n_filters * 2**stage for stage in range(len(config.ratios) + 1)]
