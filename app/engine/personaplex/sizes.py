"""How much memory the model takes and how many calls fit, by arithmetic: nothing is loaded, and torch is not needed."""

from collections.abc import Iterator
from dataclasses import dataclass

from app.engine.personaplex.model.config import CODEBOOKS, COLUMN_ROWS, LmConfig, MimiConfig

RESERVE_BYTES = 2**30
"""Left free beside everything counted: libraries' workspaces, fragments, the captured graphs themselves, and at most
some 5 MB in which attention that is split over a sequence keeps its partial sums. An allowance, not measured."""

HOT_FRAMES = 1_200
"""Frames of prompts kept on the device, 0.6 GB in bfloat16: a call of such a persona starts without a transfer."""
KEPT_FRAMES = 500
"""How much of the conversation, 40 s, a rebuild keeps: what it costs is what all calls together can pay."""
COPIES = 4
"""Rows being made anew at once. With these, of 6,000 ticks of 75 calls that began together 79 read more than 128
frames, 11 more than 300 and none more than 480 (simulated three times, with prompts of 112 frames)."""

_FLOAT32_BYTES, _INT64_BYTES, _INT32_BYTES = 4, 8, 4
_STORED_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5}
_INT4_GROUP = 128
_INT4_GROUP_BYTES = 4
_SMALL_STATE_BYTES = 16 * 2**10
"""A row's positions, settings, last tokens and guided words, rounded up."""
PASS_FRAMES = 512
_PROMPT_FRAMES = 150
_STEP_ACTIVATIONS = 11
"""What lives at once at the worst moment of a step, inside the codec's decoder: as much as so many of its widest
activations (counted, on tensors without memory: 10.9)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device. `row_bytes` is the state of one call: keys and values, history of tokens, codec streams.

    `step_bytes_per_row` is an estimate: what a step of all rows makes and drops again. A captured step keeps it for
    itself, once for all widths, because the widest is captured first and the others find their place in it.

    `copy_bytes` is an estimate: one row being made anew, behind a prompt of 150 frames.

    `workspace_bytes` is an estimate: the prompts kept ready, and the activations of a pass over 512 positions at their
    widest, inside a feed-forward block; where keys and values are quantised, also those of one layer as numbers that a
    pass can read.
    """

    weights_bytes: int
    codec_weights_bytes: int
    row_bytes: int
    step_bytes_per_row: int
    prefix_bytes_per_frame: int
    copy_bytes: int
    workspace_bytes: int

    def needed_bytes(self, rows: int) -> int:
        """For this many calls at once, the reserve included."""
        fixed = self.weights_bytes + self.codec_weights_bytes + self.workspace_bytes + RESERVE_BYTES
        return fixed + rows * self.call_bytes + min(rows, COPIES) * self.copy_bytes

    @property
    def call_bytes(self) -> int:
        """What one call more takes."""
        return self.row_bytes + self.step_bytes_per_row


def footprint(lm: LmConfig, mimi: MimiConfig, element_bytes: int, weights: str = "bf16", kv: str = "bf16") -> Footprint:
    """
    Args:
        element_bytes: of the dtype that is computed in, 2 for bfloat16 and float16, 4 for float32. The codec is float32
            whatever the model is.
        weights, kv: how the large matrices, and keys and values, are kept; "bf16" is as the model's dtype is.
    """
    frame_bytes = _frame_bytes(lm, element_bytes, kv)
    # Three activations of the model's width, four of the block's, and two float32 ones that normalise.
    widest_bytes = (3 * lm.dim + 4 * lm.hidden) * element_bytes + 2 * lm.dim * _FLOAT32_BYTES
    # Keys and values of one layer, before and after their scales.
    read_bytes = 0 if kv == "bf16" else 2 * lm.ring * lm.dim * (2 * _FLOAT32_BYTES + element_bytes)
    ring_bytes = lm.ring * (frame_bytes + COLUMN_ROWS * _INT32_BYTES)
    return Footprint(
        weights_bytes=lm_bytes(lm, element_bytes, weights),
        codec_weights_bytes=codec_elements(mimi, CODEBOOKS) * _FLOAT32_BYTES,
        row_bytes=ring_bytes + codec_row_bytes(mimi) + _SMALL_STATE_BYTES,
        step_bytes_per_row=_step_bytes(mimi),
        prefix_bytes_per_frame=frame_bytes,
        copy_bytes=min(lm.ring, _PROMPT_FRAMES + KEPT_FRAMES) * frame_bytes,
        workspace_bytes=HOT_FRAMES * frame_bytes + PASS_FRAMES * widest_bytes + read_bytes,
    )


def rows_that_fit(footprint: Footprint, free_bytes: int) -> int:
    """Calls at once on a device with so much memory free before anything is loaded; RESERVE_BYTES stay free."""
    beyond = (free_bytes - footprint.needed_bytes(COPIES)) // footprint.call_bytes
    if beyond >= 0:
        return COPIES + beyond
    return max((rows for rows in range(COPIES) if footprint.needed_bytes(rows) <= free_bytes), default=0)


def lm_bytes(lm: LmConfig, element_bytes: int, weights: str = "bf16") -> int:
    """The language model's weights with the eight depformer steps that are run.

    Quantised are the large matrices only: embeddings, heads and norms stay in the model's dtype. int8 and fp8 have a
    float32 scale for each output; int4 has a scale and a zero, two bytes each, for 128 inputs of an output.
    """
    whole = lm_elements(lm, CODEBOOKS) * element_bytes
    if weights == "bf16":
        return whole
    return whole + sum(
        count * outputs * (_inputs_bytes(inputs, weights) - inputs * element_bytes)
        for count, outputs, inputs in _large_matrices(lm)
    )


def _inputs_bytes(inputs: int, weights: str) -> int:
    """Of all inputs of one output, scales included."""
    stored = int(inputs * _STORED_BYTES[weights])
    if weights != "int4":
        return stored + _FLOAT32_BYTES
    # Of matrices that 128 does not divide the groups are smaller.
    group = next(size for size in range(min(_INT4_GROUP, inputs), 0, -1) if inputs % size == 0 and size % 2 == 0)
    return stored + inputs // group * _INT4_GROUP_BYTES


def _large_matrices(lm: LmConfig) -> Iterator[tuple[int, int, int]]:
    """How many there are, and their outputs and inputs."""
    temporal = (lm.num_layers, lm.dim, lm.hidden)
    depformer = (CODEBOOKS * lm.depformer_num_layers, lm.depformer_dim, lm.depformer_hidden)
    for count, dim, hidden in (temporal, depformer):
        yield count, 3 * dim, dim
        yield count, dim, dim
        yield count, 2 * hidden, dim
        yield count, dim, hidden
    yield CODEBOOKS, lm.depformer_dim, lm.dim


def _frame_bytes(lm: LmConfig, element_bytes: int, kv: str) -> int:
    """Keys and values of one position in all layers; quantised ones have a float32 scale for each head."""
    if kv == "bf16":
        return 2 * lm.num_layers * lm.dim * element_bytes
    return 2 * lm.num_layers * (int(lm.dim * _STORED_BYTES[kv]) + lm.num_heads * _FLOAT32_BYTES)


def _step_bytes(mimi: MimiConfig) -> int:
    """For each row: activations, and a frame of sound with its tokens in and out."""
    widest = mimi.n_filters * mimi.frame_samples
    return (_STEP_ACTIVATIONS * widest + 2 * (mimi.frame_samples + 2)) * _FLOAT32_BYTES


def lm_elements(lm: LmConfig, depformer_steps: int) -> int:
    """Numbers in the language model with this many depformer steps: 8 are run, the file has `dep_q`."""
    layer = 4 * lm.dim**2 + 3 * lm.dim * lm.hidden + 2 * lm.dim
    tables = 2 * CODEBOOKS * (lm.card + 1) + lm.text_card + 1
    temporal = lm.num_layers * layer + lm.dim + (tables + lm.text_card) * lm.dim
    return temporal + _depformer_elements(lm, depformer_steps)


def _depformer_elements(lm: LmConfig, steps: int) -> int:
    dim = lm.depformer_dim
    layer = steps * (4 * dim**2 + 3 * dim * lm.depformer_hidden) + 2 * dim
    tables = lm.text_card + 1 + (steps - 1) * (lm.card + 1)
    return lm.depformer_num_layers * layer + (tables + steps * (lm.dim + lm.card)) * dim


def codec_elements(mimi: MimiConfig, codebooks: int) -> int:
    """Numbers in the codec with this many codebooks: 8 are used, the file has `codebooks_in_file`."""
    width, ends = mimi.dimension, mimi.n_filters * 2 ** len(mimi.ratios)
    layer = 4 * mimi.d_model**2 + 2 * mimi.d_model * mimi.dim_feedforward + 6 * mimi.d_model
    sampling = (width**2 + width) * 2 * mimi.downsample
    quantizer = 4 * mimi.codebook_dim * width + codebooks * mimi.bins * (mimi.codebook_dim + 1)
    encoder = _conv(1, mimi.n_filters, mimi.kernel_size) + _conv(ends, width, mimi.last_kernel_size)
    decoder = _conv(width, ends, mimi.kernel_size) + _conv(mimi.n_filters, 1, mimi.last_kernel_size)
    for channels, stride in _stages(mimi):
        between = channels // mimi.compress
        residual = _conv(channels, between, mimi.residual_kernel_size) + _conv(between, channels, 1)
        encoder += residual + _conv(channels, 2 * channels, 2 * stride)
        decoder += residual + _conv(2 * channels, channels, 2 * stride)
    return encoder + decoder + 2 * mimi.num_layers * layer + sampling + quantizer


def codec_row_bytes(mimi: MimiConfig) -> int:
    """The codec's two streams of one call: what its convolutions carry from frame to frame, and two rings."""
    ends: int = mimi.n_filters * 2 ** len(mimi.ratios)
    kept = (mimi.kernel_size - 1) * (1 + mimi.dimension) + (mimi.last_kernel_size - 1) * (ends + mimi.n_filters)
    kept += 2 * mimi.downsample * mimi.dimension
    for channels, stride in _stages(mimi):
        kept += 2 * (stride + mimi.residual_kernel_size - 1) * channels
    rings = 2 * mimi.num_layers * 2 * mimi.ring * mimi.d_model
    return (kept + rings) * _FLOAT32_BYTES + 2 * _INT64_BYTES


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel + outputs


def _stages(mimi: MimiConfig) -> Iterator[tuple[int, int]]:
    """Channels and stride on the way from the samples to the latents; the way back mirrors it."""
    for stage, stride in enumerate(reversed(mimi.ratios)):
        yield mimi.n_filters * 2**stage, stride
