"""Kyutai's own implementation as a witness: the same weights and the same callers, token for token.

`moshi` knows nothing of PersonaPlex. Its prompts are forced through its hooks, and of a checkpoint it gets the eight
depformer steps that it generates with.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from moshi.models.lm import LMGen, LMModel
from moshi.models.loaders import get_mimi
from moshi.utils.compile import no_compile
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.engine.personaplex.model import rows as state_rows
from app.engine.personaplex.model.config import CODEBOOKS, PAD, LmConfig, MimiConfig
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.model.weights import load
from app.engine.personaplex.prefix import PrefixCache, open_call, place
from app.engine.personaplex.voices import CodedVoice

PARITY = Path(os.environ.get("PARITY_FIXTURES") or Path(__file__).parents[2] / "fixtures" / "parity")
CPU = torch.device("cpu")
SMALL = LmConfig(
    dim=48, num_heads=3, num_layers=3, context=21, text_card=80, card=60, dep_q=16, depformer_dim=40,
    depformer_num_heads=5, depformer_num_layers=2, depformer_dim_feedforward=165,
    silence_tokens=(1, 2, 3, 4, 5, 6, 7, 8), sine_tokens=(11, 12, 13, 14, 15, 16, 17, 18), silence_frames=2,
)  # fmt: skip
"""Sizes that no fixture has, and a window that is full before the prompt is over."""


@dataclass(frozen=True)
class Scene:
    """A checkpoint, a role and what a caller says, int64 [N, 8]."""

    config: LmConfig
    weights: Path
    voice: Tensor
    text: Tensor
    user: Tensor


class Speaker(Protocol):
    """Rows that advance together, one frame a step."""

    rows: int

    def join(self, row: int) -> None: ...

    def step(self, user: Tensor, active: Tensor) -> Tensor:
        """int64 [S, 8] and bool [S] to int64 [S, 9]."""
        ...


class Ours:
    def __init__(self, scene: Scene, rows: int) -> None:
        self.rows = rows
        self._lm = Lm(scene.config, CPU, torch.float32)
        load(scene.weights, self._lm.entries())
        self._lm.pack()
        self._prefix = PrefixCache(self._lm).of(CodedVoice("voice", scene.voice), scene.text.tolist())
        self._state = LmState.of(scene.config, rows, CPU, torch.float32)
        self._reach = Reach(longest=scene.config.ring, text_ranks=1, audio_ranks=1)

    def join(self, row: int) -> None:
        state_rows.clear(self._state, row)
        place(self._state, row, self._prefix)
        open_call(self._lm, self._state, row, self._prefix, self._reach)

    def step(self, user: Tensor, active: Tensor) -> Tensor:
        return self._lm.step(self._state, user, active, self._reach)


class Witness:
    """Steps through the prompt, one position at a time: its generator knows no other way."""

    def __init__(self, scene: Scene, rows: int) -> None:
        self.rows = rows
        self._config = c = scene.config
        self._texts = torch.tensor([PAD] * (scene.voice.shape[1] + c.silence_frames))
        self._texts = torch.cat((self._texts, scene.text, torch.tensor([PAD] * c.silence_frames)))
        self._agent = torch.tensor(c.silence_tokens).repeat(len(self._texts), 1)
        self._agent[: scene.voice.shape[1]] = scene.voice.T
        self._forced: tuple[int, int] | None = None
        self._gen = LMGen(
            witness_model(c, scene.weights),
            use_sampling=False,
            support_out_of_sync=True,
            on_text_hook=self._force_text,
            on_audio_hook=self._force_audio,
        )
        self._gen.streaming_forever(rows)

    def join(self, row: int) -> None:
        only = torch.arange(self.rows) == row
        self._gen.reset_streaming(only)
        sine = torch.tensor(self._config.sine_tokens).repeat(self.rows, 1)
        for position in range(len(self._texts)):
            self._forced = row, position + 1
            self.step(sine, only)
        self._forced = None

    def step(self, user: Tensor, active: Tensor) -> Tensor:
        self._gen.set_exec_mask(active)
        frames: Tensor | None = self._gen.step(user[:, :, None])
        assert frames is not None
        return frames[:, :, 0]

    def _force_text(self, tokens: Tensor) -> None:
        if self._forced is not None and self._forced[1] < len(self._texts):
            row, position = self._forced
            tokens[row] = self._texts[position]

    def _force_audio(self, tokens: Tensor) -> None:
        if self._forced is None:
            return
        row, position = self._forced
        if position < len(self._agent):
            tokens[row, 0] = self._agent[position, 0]
        tokens[row, 1:] = self._agent[position - 1, 1:]


def witness_model(config: LmConfig, weights: Path) -> LMModel:
    """`context` without the oldest slot, which PersonaPlex's own ring masks and this package's does not."""
    kind: Any = LMModel
    model: LMModel = kind(
        delays=[0, 0, *[1] * 7, 0, *[1] * 7], n_q=2 * CODEBOOKS, dep_q=CODEBOOKS, card=config.card,
        text_card=config.text_card, dim=config.dim, num_heads=config.num_heads, num_layers=config.num_layers,
        hidden_scale=config.hidden_scale, norm="rms_norm_f32", gating="silu", causal=True, layer_scale=None,
        context=config.context - 1, max_period=config.max_period, positional_embedding="rope",
        existing_text_padding_id=PAD, depformer_dim=config.depformer_dim,
        depformer_num_heads=config.depformer_num_heads, depformer_num_layers=config.depformer_num_layers,
        depformer_multi_linear=True,
        depformer_dim_feedforward=config.depformer_dim_feedforward, depformer_gating="silu",
        depformer_pos_emb="none", depformer_weights_per_step=True,
    )  # fmt: skip
    with safe_open(weights, framework="pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    model.load_state_dict(first_steps(tensors, config.dep_q), strict=True)
    model.eval()
    return model


def first_steps(tensors: Mapping[str, Tensor], dep_q: int) -> dict[str, Tensor]:
    """The weights of the depformer's first eight steps, and everything else."""
    kept = {}
    for key, tensor in tensors.items():
        place, _, rest = key.partition(".")
        step = int(rest.split(".")[0]) if place in ("linears", "depformer_in", "depformer_emb") else 0
        if place == "depformer" and ".gating." in key:
            step = int(key.split(".gating.")[1].split(".")[0])
        if place == "depformer" and ".self_attn." in key:
            tensor = tensor[: len(tensor) * CODEBOOKS // dep_q]
        if step < CODEBOOKS - (place == "depformer_emb"):
            kept[key] = tensor
    return kept


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    """What the witness would compile needs a C++ compiler."""
    with no_compile():
        yield


def talk(speaker: Speaker, calls: Sequence[Tensor], ticks: Sequence[Sequence[int | None]]) -> list[Tensor]:
    """What each call is told, int64 [N, 9]; a tick says which call is on each row and has a frame to give."""
    told: list[list[Tensor]] = [[] for _ in calls]
    for tick in ticks:
        user = torch.zeros(speaker.rows, CODEBOOKS, dtype=torch.int64)
        for row, call in enumerate(tick):
            if call is not None:
                if not told[call]:
                    speaker.join(row)
                user[row] = calls[call][len(told[call])]
        frames = speaker.step(user, torch.tensor([call is not None for call in tick]))
        for row, call in enumerate(tick):
            if call is not None:
                told[call].append(frames[row].clone())
    return [torch.stack(frames) for frames in told]


def recordings(kind: str) -> list[str]:
    """What the folder of recorded tensors holds, by name."""
    return sorted(
        file.name[len(kind) + 1 : -len("_io.safetensors")] for file in PARITY.glob(f"{kind}_*_io.safetensors")
    )


def weights_of(kind: str, name: str) -> Path:
    """A recording's own weights, or those that it shares with the one whose name its own begins with."""
    files = {file.name[: -len("_weights.safetensors")]: file for file in PARITY.glob(f"{kind}_*_weights.safetensors")}
    return files[max((place for place in files if f"{kind}_{name}".startswith(place)), key=len)]


def recorded(name: str) -> Scene:
    path = PARITY / f"lm_{name}_io.safetensors"
    with safe_open(path, framework="pt") as file:
        given: dict[str, Any] = {key: json.loads(value) for key, value in file.metadata().items()}
        voice, text, user = (file.get_tensor(k) for k in ("voice_codes", "text_prompt_tokens", "user_codes"))
    config = LmConfig.of({**given["config"], **{k: v for k, v in given.items() if k.startswith(("silence", "sine"))}})
    return Scene(config, weights_of("lm", name), voice, text, user.T)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A random checkpoint of its own sizes, written with every tensor that a real one has."""
    chance = torch.Generator().manual_seed(6)
    weights = {}
    for key, entry in Lm(SMALL, CPU, torch.float32).entries().items():
        drawn = torch.randn(entry.shape, generator=chance)
        if key.endswith("alpha"):
            weights[key] = 1 + 0.1 * drawn
        else:
            weights[key] = drawn * (1.0 if "emb" in key else entry.shape[-1] ** -0.5)
    file = tmp_path_factory.mktemp("made") / "model.safetensors"
    save_file(weights, file)
    user = torch.randint(0, SMALL.card, (50, CODEBOOKS), generator=chance)
    voice = torch.randint(0, SMALL.card, (CODEBOOKS, 11), generator=chance)
    return Scene(SMALL, file, voice, torch.randint(4, SMALL.text_card, (7,), generator=chance), user)


@pytest.fixture(params=[*recordings("lm"), "made"])
def scene(request: pytest.FixtureRequest) -> Scene:
    if request.param == "made":
        made: Scene = request.getfixturevalue("made")
        return made
    return recorded(request.param)


def test_a_call_is_told_the_same_by_both(scene: Scene) -> None:
    ticks = [[0]] * len(scene.user)
    (ours,), (theirs,) = (talk(kind(scene, 1), [scene.user], ticks) for kind in (Ours, Witness))

    assert torch.equal(ours, theirs)
    assert len(set(ours.flatten().tolist())) > 1 + CODEBOOKS


def test_three_ragged_calls_on_two_rows_are_told_the_same_by_both(scene: Scene) -> None:
    """Rows skip frames, one call ends and another takes its row while the neighbour talks on."""
    chance = torch.Generator().manual_seed(1)
    whole = len(scene.user)
    calls = [scene.user[:frames].roll(frames, 1) for frames in (whole // 4, whole * 3 // 4, whole // 2)]
    left = {0: [0] * len(calls[0]) + [2] * len(calls[2]), 1: [1] * len(calls[1])}
    ticks: list[list[int | None]] = []
    while any(left.values()):
        speaks = torch.rand(2, generator=chance) < 0.7
        ticks.append([left[row].pop(0) if speaks[row] and left[row] else None for row in (0, 1)])
    ours, theirs = (talk(kind(scene, 2), calls, ticks) for kind in (Ours, Witness))

    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_witness_parts_from_us_where_it_keeps_one_key_more(made: Scene) -> None:
    """The comparison can tell one position of the window from none."""
    wider = replace(made, config=replace(made.config, context=made.config.context + 1))
    (ours,), (theirs,) = (
        talk(speaker, [made.user], [[0]] * len(made.user)) for speaker in (Ours(made, 1), Witness(wider, 1))
    )

    assert not torch.equal(ours, theirs)


@dataclass(frozen=True)
class Recording:
    """A codec's checkpoint and something to encode, float32 [T, 1920]."""

    sizes: dict[str, Any]
    weights: Path
    frames: Tensor

    def ours(self) -> Mimi:
        mimi = Mimi(MimiConfig.of(self.sizes), CPU)
        load(self.weights, mimi.entries())
        mimi.pack()
        return mimi

    def witness(self, rows: int) -> Any:
        ring = {**self.sizes["transformer"], "context": self.sizes["transformer"]["context"] - 1}
        rates = {"channels": 1, "sample_rate": 24_000, "frame_rate": 12.5}
        mimi = get_mimi(self.weights, {**self.sizes, **rates, "transformer": ring}, num_codebooks=CODEBOOKS)
        mimi.streaming_forever(rows)
        return mimi


@pytest.fixture(params=recordings("mimi"))
def recording(request: pytest.FixtureRequest) -> Recording:
    with safe_open(PARITY / f"mimi_{request.param}_io.safetensors", framework="pt") as file:
        sizes, wav = json.loads(file.metadata()["config"]), file.get_tensor("wav")
    return Recording(sizes, weights_of("mimi", request.param), wav.view(-1, 1920))


def test_a_codec_stream_is_the_same_by_both(recording: Recording) -> None:
    ours, theirs = recording.ours(), recording.witness(1)
    state, active = ours.state(1), torch.ones(1, dtype=torch.bool)
    for frame in recording.frames:
        with torch.no_grad():
            expected = theirs.encode(frame[None, None])
            sound = theirs.decode(expected)
        codes = ours.encode(state, frame[None], active)

        assert torch.equal(codes, expected[:, :, 0])
        assert torch.allclose(ours.decode(state, codes, active), sound[:, 0], atol=1e-5, rtol=0)


def test_codec_streams_that_begin_and_skip_on_their_own_are_the_same_by_both(recording: Recording) -> None:
    ours, theirs = recording.ours(), recording.witness(2)
    state, chance = ours.state(2), torch.Generator().manual_seed(3)
    sounds = torch.stack((recording.frames, recording.frames.flip(0)), 1)
    for tick, frames in enumerate(sounds):
        active = torch.rand(2, generator=chance) < 0.7
        if tick == len(sounds) // 2:
            theirs.reset_streaming(torch.tensor([False, True]))
            state_rows.clear(state, 1)
        theirs.set_exec_mask(active)
        with torch.no_grad():
            expected = theirs.encode(frames[:, None])
            sound = theirs.decode(expected)
        codes = ours.encode(state, frames, active)

        assert torch.equal(codes[active], expected[active][:, :, 0])
        assert torch.allclose(ours.decode(state, codes, active)[active], sound[active][:, 0], atol=1e-5, rtol=0)
