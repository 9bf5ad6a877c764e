"""The codec as rows of one batch, each row a stream that begins, waits and ends by itself."""

from math import prod

import pytest
import torch
from torch import Tensor

from app.engine.personaplex.model import rows
from app.engine.personaplex.model.config import CODEBOOKS, MimiConfig
from app.engine.personaplex.model.mimi import Mimi, MimiState

CPU = torch.device("cpu")
META = torch.device("meta")
SMALL = MimiConfig(
    n_filters=4, dimension=64, d_model=64, num_heads=4, num_layers=2, context=16, dim_feedforward=128, codebook_dim=32,
    codebooks_in_file=10, bins=128,
)  # fmt: skip
STREAMS, TICKS = 3, 30
"""Of frames: the ring of `SMALL` is full after 8."""
NOBODY = torch.zeros(STREAMS, dtype=torch.bool)


def random_weights(config: MimiConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, such that codes vary from frame to frame."""
    draw = torch.Generator().manual_seed(1)
    weights = {}
    for key, entry in Mimi(config, META).entries().items():
        values = torch.randn(entry.shape, generator=draw)
        if key.endswith(("_initialized", "cluster_usage")):
            values = values.abs() + 0.5
        elif key.endswith("bias"):
            values *= 0.1
        elif not key.endswith("embedding_sum"):
            values *= prod(entry.shape[1:]) ** -0.5
        weights[key] = values
    return weights


def sound(ticks: int, streams: int) -> Tensor:
    """Noise that the strides do not average away: [ticks, streams, 1920]."""
    draw = torch.Generator().manual_seed(2)
    return torch.randn(ticks, streams, SMALL.frame_samples // 80, generator=draw).repeat_interleave(80, -1)


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    built, weights = Mimi(SMALL, CPU), random_weights(SMALL)
    for key, entry in built.entries().items():
        if entry.into is not None:
            entry.into.copy_(weights[key].reshape(entry.into.shape))
    built.pack()
    return built


def coded(mimi: Mimi, state: MimiState, pcm: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """One tick with the same frame both ways; what an inactive row is given is garbage."""
    codes = mimi.encode(state, torch.where(active[:, None], pcm, torch.nan), active)
    return codes, mimi.decode(state, torch.where(active[:, None], codes, 10**9), active)


def alone(mimi: Mimi, row: int, frames: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [T, 8] and the sound [T, 1920] of one stream in a batch that holds nothing else."""
    state, active = mimi.state(STREAMS), NOBODY.clone()
    active[row] = True
    ticks = [coded(mimi, state, frame.expand(STREAMS, -1), active) for frame in frames]
    return torch.stack([codes[row] for codes, _ in ticks]), torch.stack([pcm[row] for _, pcm in ticks])


def poison(state: MimiState, row: int) -> None:
    for tensor in rows.leaves(state):
        tensor[row] = torch.nan if tensor.is_floating_point() else 12_345


def assert_heard(found: list[tuple[Tensor, Tensor]], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(torch.stack([codes for codes, _ in found]), expected[0])
    assert torch.equal(torch.stack([pcm for _, pcm in found]), expected[1])


@pytest.mark.parametrize("seed", range(3))
def test_streams_that_start_late_and_skip_ticks_sound_as_each_alone(mimi: Mimi, seed: int) -> None:
    frames, state = sound(TICKS, STREAMS), mimi.state(STREAMS)
    active = torch.rand(TICKS, STREAMS, generator=torch.Generator().manual_seed(seed)) < 0.7
    active &= torch.arange(TICKS)[:, None] >= torch.tensor([0, 3, 7])

    ticks = [coded(mimi, state, frames[tick], active[tick]) for tick in range(TICKS)]

    for row in range(STREAMS):
        took_part = active[:, row].nonzero().flatten().tolist()
        heard = [(ticks[tick][0][row], ticks[tick][1][row]) for tick in took_part]
        assert_heard(heard, alone(mimi, row, frames[took_part, row]))
        assert len({tuple(codes.tolist()) for codes, _ in heard}) > len(heard) / 2


def test_a_freed_row_full_of_nan_disturbs_nobody_and_once_cleared_is_a_new_stream(mimi: Mimi) -> None:
    frames, state = sound(TICKS, STREAMS), mimi.state(STREAMS)
    everyone, without_freed = ~NOBODY, torch.tensor([True, False, True])
    for frame in frames[:12]:
        coded(mimi, state, frame, everyone)

    poison(state, 1)
    meanwhile = [coded(mimi, state, frame, without_freed) for frame in frames[12:20]]
    rows.clear(state, 1)
    afterwards = [coded(mimi, state, frame, everyone) for frame in frames[20:]]

    assert_heard([(codes[1], pcm[1]) for codes, pcm in afterwards], alone(mimi, 1, frames[20:, 1]))
    for row in (0, 2):
        found = [(codes[row], pcm[row]) for codes, pcm in meanwhile + afterwards]
        codes, pcm = alone(mimi, row, frames[:, row])
        assert_heard(found, (codes[12:], pcm[12:]))


@pytest.mark.parametrize("ticks", [0, 3, 20])
def test_a_row_that_is_not_active_keeps_all_but_the_slots_it_writes_next(mimi: Mimi, ticks: int) -> None:
    state = mimi.state(STREAMS)
    for frame in sound(ticks, STREAMS):
        coded(mimi, state, frame, ~NOBODY)
    before = rows.snapshot(state, 1)

    coded(mimi, state, sound(1, STREAMS)[0], torch.tensor([True, False, True]))

    after = rows.snapshot(state, 1)
    for old, new in ((before.encoder, after.encoder), (before.decoder, after.decoder)):
        kept = torch.ones(SMALL.ring, dtype=torch.bool)
        kept[[(2 * ticks) % SMALL.ring, (2 * ticks + 1) % SMALL.ring]] = False
        assert torch.equal(new.kv[..., kept, :], old.kv[..., kept, :])
        assert torch.equal(new.carry, old.carry)
        assert new.position.tolist() == old.position.tolist() == [2 * ticks]


def test_a_row_continues_in_another_row_from_its_snapshot(mimi: Mimi) -> None:
    frames, state = sound(TICKS, 1).expand(-1, STREAMS, -1), mimi.state(STREAMS)
    for frame in frames[:11]:
        coded(mimi, state, frame, torch.tensor([True, False, False]))

    rows.restore(state, 2, rows.snapshot(state, 0))

    for frame in frames[11:]:
        codes, pcm = coded(mimi, state, frame, torch.tensor([True, False, True]))
        assert torch.equal(codes[2], codes[0])
        torch.testing.assert_close(pcm[2], pcm[0], rtol=0, atol=1e-5)


def test_a_recording_is_encoded_as_a_stream_of_its_frames_would_be(mimi: Mimi) -> None:
    frames, state = sound(TICKS, 1), mimi.state(1)
    streamed = torch.cat([mimi.encode(state, frame, torch.tensor([True])) for frame in frames])

    whole = mimi.encode_whole(frames.flatten())

    assert whole.shape == (CODEBOOKS, TICKS)
    assert torch.equal(whole, streamed.T)


def test_silence_completes_the_last_frame_of_a_recording(mimi: Mimi) -> None:
    pcm = sound(3, 1).flatten()
    pcm[5_000:] = 0

    assert torch.equal(mimi.encode_whole(pcm[:5_000]), mimi.encode_whole(pcm))


def test_a_step_reads_nothing_back_and_changes_its_state_in_place() -> None:
    """So that it can be captured: on the meta device a value that Python asked for would be an error."""
    mimi = Mimi(SMALL, META)
    mimi.pack()
    state, active = mimi.state(STREAMS), NOBODY.to(META)
    tensors = list(rows.leaves(state))

    codes = mimi.encode(state, torch.empty(STREAMS, SMALL.frame_samples, device=META), active)
    pcm = mimi.decode(state, codes, active)

    assert (codes.shape, codes.dtype) == ((STREAMS, CODEBOOKS), torch.int64)
    assert (pcm.shape, pcm.dtype) == ((STREAMS, SMALL.frame_samples), torch.float32)
    assert all(before is after for before, after in zip(tensors, rows.leaves(state), strict=True))


def test_the_real_file_has_318_tensors_of_which_the_later_codebooks_are_not_read() -> None:
    entries = Mimi(MimiConfig(), META).entries()

    assert len(entries) == 318
    assert sum(prod(entry.shape) for entry in entries.values()) == 96_151_393
    unread = {key for key, entry in entries.items() if entry.into is None}
    assert {key for key in unread if "_initialized" not in key} == {
        f"quantizer.rvq_rest.vq.layers.{book}._codebook.{part}"
        for book in range(7, 31)
        for part in ("cluster_usage", "embedding_sum")
    }
    assert len(unread) == 2 * 24 + 32


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("encoder.model.0.conv.conv.weight", (64, 1, 7)),
        ("encoder.model.10.block.3.conv.conv.weight", (512, 256, 1)),
        ("encoder.model.12.conv.conv.weight", (1024, 512, 16)),
        ("encoder.model.14.conv.conv.bias", (512,)),
        ("encoder_transformer.transformer.layers.7.self_attn.in_proj_weight", (1536, 512)),
        ("downsample.conv.conv.conv.weight", (512, 512, 4)),
        ("quantizer.rvq_rest.vq.layers.6._codebook.embedding_sum", (2048, 256)),
        ("upsample.convtr.convtr.convtr.weight", (512, 1, 4)),
        ("decoder_transformer.transformer.layers.0.linear2.weight", (512, 2048)),
        ("decoder.model.11.convtr.convtr.weight", (128, 64, 8)),
        ("decoder.model.12.block.1.conv.conv.bias", (32,)),
        ("decoder.model.14.conv.conv.weight", (1, 64, 3)),
    ],
)
def test_the_real_files_tensors_have_their_names_and_shapes(key: str, shape: tuple[int, ...]) -> None:
    assert Mimi(MimiConfig(), META).entries()[key].shape == shape
