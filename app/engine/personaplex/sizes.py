"""How much memory the model takes and how many calls fit, by arithmetic: nothing is loaded, and torch is not needed."""

from collections.abc import Iterator
from dataclasses import dataclass

from app.engine.personaplex.model.config import CODEBOOKS, COLUMN_ROWS, LmConfig, MimiConfig

RESERVE_BYTES = 2**30
"""Left free beside everything counted: libraries' workspaces, fragments, and some 4 MB a row that one step makes."""

HOT_FRAMES = 1_200
"""Frames of prompts kept on the device, 0.6 GB in bfloat16: a call of such a persona starts without a transfer."""
KEPT_FRAMES = 500
"""How much of the conversation, 40 s, a rebuild keeps: what it costs is what all calls together can pay."""
COPIES = 4
"""Rows being made anew at once. With these, 41 calls that began together never read more than 130 frames in a tick,
and 75 calls 490, once (simulated: 6,000 ticks, prompts of 112 frames)."""

_FLOAT32_BYTES, _INT64_BYTES, _INT32_BYTES = 4, 8, 4
_SMALL_STATE_BYTES = 16 * 2**10
"""A row's positions, settings, last tokens and guided words, rounded up."""
_PASS_FRAMES = 512
_PROMPT_FRAMES = 150


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device. `row_bytes` is the state of one call: keys and values, history of tokens, codec streams.

    `workspace_bytes` is an estimate: the rows being made anew behind prompts of 150 frames, the prompts kept ready, and
    the activations of a pass over 512 positions at their widest, inside a feed-forward block.
    """

    weights_bytes: int
    codec_weights_bytes: int
    row_bytes: int
    prefix_bytes_per_frame: int
    workspace_bytes: int

    def needed_bytes(self, rows: int) -> int:
        """For this many calls at once, the reserve included."""
        fixed = self.weights_bytes + self.codec_weights_bytes + self.workspace_bytes
        return fixed + rows * self.row_bytes + RESERVE_BYTES


def footprint(lm: LmConfig, mimi: MimiConfig, element_bytes: int) -> Footprint:
    """`element_bytes`: 2 for bfloat16 and float16, 4 for float32. The codec is float32 whatever the model is."""
    frame_bytes = 2 * lm.num_layers * lm.dim * element_bytes
    ring_bytes = lm.ring * frame_bytes
    copies_frames = COPIES * min(lm.ring, _PROMPT_FRAMES + KEPT_FRAMES)
    # Three activations of the model's width, four of the block's, and two float32 ones that normalise.
    widest_bytes = (3 * lm.dim + 4 * lm.hidden) * element_bytes + 2 * lm.dim * _FLOAT32_BYTES
    return Footprint(
        weights_bytes=lm_elements(lm, CODEBOOKS) * element_bytes,
        codec_weights_bytes=codec_elements(mimi, CODEBOOKS) * _FLOAT32_BYTES,
        row_bytes=ring_bytes + lm.ring * COLUMN_ROWS * _INT32_BYTES + codec_row_bytes(mimi) + _SMALL_STATE_BYTES,
        prefix_bytes_per_frame=frame_bytes,
        workspace_bytes=(copies_frames + HOT_FRAMES) * frame_bytes + _PASS_FRAMES * widest_bytes,
    )


def rows_that_fit(footprint: Footprint, free_bytes: int) -> int:
    """Calls at once on a device with so much memory free before anything is loaded; RESERVE_BYTES stay free."""
    return max(0, (free_bytes - footprint.needed_bytes(0)) // footprint.row_bytes)


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
