"""Token for token what the model's own implementation says, in float32, from tensors that it was recorded with.

`PARITY_FIXTURES` names another folder of the same form; every size comes from the files.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from app.engine.personaplex.model import rows
from app.engine.personaplex.model.config import CODEBOOKS, LmConfig, MimiConfig
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.model.ring import Ring
from app.engine.personaplex.model.weights import load
from app.engine.personaplex.prefix import Prefix, PrefixCache, Prompt, build_prompt, inputs, open_call, place
from app.engine.personaplex.voices import CodedVoice, Voice, read_packed_voice

HERE = Path(__file__).resolve().parent.parent / "fixtures" / "parity"
FOLDER = Path(os.environ.get("PARITY_FIXTURES") or HERE)
CPU = torch.device("cpu")
ACTIVE = torch.ones(1, dtype=torch.bool)


def names(kind: str, ending: str) -> list[str]:
    found = sorted(file.stem for file in FOLDER.glob(f"{kind}_*_{ending}.safetensors"))
    assert found, f"{FOLDER} holds no {kind}_*_{ending}.safetensors"
    return [name.removeprefix(f"{kind}_").removesuffix(f"_{ending}") for name in found]


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118


def weights_of(kind: str, name: str, sizes: dict[str, object]) -> Path:
    """The weights that a recording was made with: of its own name, of the name that it continues, or of its sizes."""
    continued = [other for other in names(kind, "weights") if name.startswith(other)]
    files = [FOLDER / f"{kind}_{other}_weights.safetensors" for other in continued or names(kind, "weights")]
    if continued:
        return max(files, key=lambda file: len(file.name))
    same = [file for file in files if alike(json.loads(read(file)[1]["config"]), sizes)]
    assert len(same) == 1, f"{kind}_{name}_io: {len(same)} weights files have its sizes; one is right"
    return same[0]


def alike(one: dict[str, object], other: dict[str, object]) -> bool:
    """Equal but for the window, which is no matter of the weights."""
    return all(other.get(key) == value for key, value in one.items() if key != "context")


def keeps(name: str, key: str) -> bool:
    return key in read(FOLDER / f"lm_{name}_io.safetensors")[0]


@dataclass(frozen=True, eq=False)
class Recorded:
    """One recorded call: the model, its prompt, what the user's codes were and what came out."""

    name: str
    lm: Lm
    io: dict[str, Tensor]

    @property
    def prompt(self) -> Prompt:
        return self.prompt_with(CodedVoice("recorded", self.io["voice_codes"]))

    def prompt_with(self, voice: Voice) -> Prompt:
        return build_prompt(self.lm.config, voice, self.io["text_prompt_tokens"].tolist())

    @property
    def frames(self) -> int:
        return self.io["user_codes"].shape[1]

    @property
    def expected(self) -> Tensor:
        """[9, N - 1]: the recording came a frame later, its first output is still the prompt's silence."""
        return self.io["out_frames"][: 1 + CODEBOOKS, 1:]


@cache
def recorded(name: str) -> Recorded:
    io, about = read(FOLDER / f"lm_{name}_io.safetensors")
    sizes = json.loads(about["config"])
    for key in ("silence_tokens", "sine_tokens", "silence_frames"):
        if key in about:
            sizes[key] = json.loads(about[key])
    lm = Lm(LmConfig.of(sizes, name), CPU, torch.float32)
    load(weights_of("lm", name, sizes), lm.entries())
    lm.pack()
    return Recorded(name, lm, io)


every_call = pytest.mark.parametrize("name", names("lm", "io"))


class Rows:
    """The language model with S rows, as a runner drives it: greedy."""

    def __init__(self, lm: Lm, count: int) -> None:
        self.lm, self.state = lm, LmState.of(lm.config, count, CPU, torch.float32)
        self.positions = [0] * count

    def join(self, row: int, prefix: Prefix) -> None:
        rows.clear(self.state, row)
        place(self.state, row, prefix)
        open_call(self.lm, self.state, row, prefix, Reach(1, 1, 1))
        self.positions[row] = len(prefix.prompt)

    def step(self, user: dict[int, Tensor]) -> dict[int, Tensor]:
        """A tick in which these rows have a frame; what each of them says."""
        heard = torch.zeros(len(self.positions), CODEBOOKS, dtype=torch.int64)
        active = torch.zeros(len(self.positions), dtype=torch.bool)
        for row, codes in user.items():
            heard[row], active[row] = codes, True
            self.positions[row] += 1
        longest = max(self.positions[row] for row in user)
        frame = self.lm.step(self.state, heard, active, Reach(longest, 1, 1))
        return {row: frame[row] for row in user}

    def say(self, row: int, user_codes: Tensor) -> Tensor:
        """A whole call alone on the batch: [9, N]."""
        return torch.stack([self.step({row: codes})[row] for codes in user_codes.T], 1)


def prefix_of(call: Recorded) -> Prefix:
    return PrefixCache(call.lm).read(call.prompt)


@every_call
def test_the_prompt_is_laid_out_as_recorded(name: str) -> None:
    call = recorded(name)
    prompt, kept, length = call.prompt, call.io["cache_after_prompt"], int(call.io["T0"])

    assert len(prompt) == length
    assert torch.equal(prompt.columns[-1], kept[:, (length - 1) % kept.shape[1]])
    owed = kept[:, length % kept.shape[1]]
    assert owed[2:9].tolist() == list(call.lm.config.silence_tokens[1:])
    assert owed[10:17].tolist() == list(call.lm.config.sine_tokens[1:])


@every_call
def test_one_parallel_pass_reads_the_prompt_as_the_recording_did_step_by_step(name: str) -> None:
    call = recorded(name)
    prompt = call.prompt
    fed = inputs(call.lm, prompt)
    kv = Ring.of(call.lm.config, 1, len(fed), CPU, torch.float32)

    hidden = call.lm.transformer.extend(fed, kv, 0)

    torch.testing.assert_close(hidden[:-1], call.io["hidden"][: len(prompt) - 1], atol=2e-5, rtol=1e-4)
    if "text_logits" in call.io:
        logits = call.lm.text_logits(hidden[:-1])
        torch.testing.assert_close(logits, call.io["text_logits"][: len(prompt) - 1], atol=2e-4, rtol=1e-4)


@every_call
def test_a_parallel_prompt_and_a_stepwise_one_are_followed_by_the_same_call(name: str) -> None:
    call = recorded(name)
    prompt, parallel = call.prompt, prefix_of(call)
    fed = inputs(call.lm, prompt)
    kv = parallel.kv.like(len(fed))
    for at in range(len(fed)):
        hidden = call.lm.transformer.extend(fed[at : at + 1], kv, at)
    stepwise = Prefix(prompt, kv, hidden)

    torch.testing.assert_close(stepwise.kv.values, parallel.kv.values, atol=2e-5, rtol=1e-4)
    said = []
    for prefix in (parallel, stepwise):
        batch = Rows(call.lm, 1)
        batch.join(0, prefix)
        said.append(batch.say(0, call.io["user_codes"]))
    assert torch.equal(*said)


@every_call
def test_live_frames_are_the_recorded_ones_a_frame_earlier(name: str) -> None:
    call = recorded(name)
    batch = Rows(call.lm, 1)
    batch.join(0, prefix_of(call))

    said = batch.say(0, call.io["user_codes"])

    assert torch.equal(said[:, :-1], call.expected)


@pytest.mark.parametrize("name", [name for name in names("lm", "io") if keeps(name, "kv_layer0_k")])
def test_keys_and_values_after_a_call_are_the_recorded_ones(name: str) -> None:
    call = recorded(name)
    batch = Rows(call.lm, 1)
    batch.join(0, prefix_of(call))
    batch.say(0, call.io["user_codes"])

    c, position = call.lm.config, batch.positions[0]
    # The recording came a frame later, so it has not seen the last position.
    held = torch.arange(max(0, position - c.ring), position - 1)
    for which, key in enumerate(("kv_layer0_k", "kv_layer0_v")):
        ours = batch.state.kv.values[0, 0, which][:, held % c.ring]
        torch.testing.assert_close(ours, call.io[key][:, held % c.context], atol=2e-5, rtol=1e-4)


@every_call
def test_the_depformers_eight_steps_choose_the_recorded_codes(name: str) -> None:
    call = recorded(name)
    live = slice(int(call.io["T0"]), None)
    hidden, text = call.io["hidden"][live], call.io["greedy_text"][live]
    logits: list[Tensor] = []

    def likeliest(codebook: int, seen: Tensor) -> Tensor:
        logits.append(seen)
        return seen.argmax(-1)

    codes = call.lm.depformer.run(hidden, text, likeliest)

    assert torch.equal(codes, call.io["greedy_audio"][live, :CODEBOOKS])
    if "audio_logits" in call.io:
        recorded_logits = call.io["audio_logits"][live, :CODEBOOKS]
        torch.testing.assert_close(torch.stack(logits, 1), recorded_logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in names("lm", "io") if (FOLDER / f"lm_{n}_voice.pt").is_file()])
def test_a_packed_voice_opens_the_call_as_its_codes_do(name: str) -> None:
    call = recorded(name)
    voice = read_packed_voice(FOLDER / f"lm_{name}_voice.pt", call.lm.config, call.lm.initial_embedding())
    prompt = call.prompt_with(voice)

    assert torch.equal(prompt.columns[voice.frames - 1 :], call.prompt.columns[voice.frames - 1 :])
    batch = Rows(call.lm, 1)
    batch.join(0, PrefixCache(call.lm).read(prompt))
    assert torch.equal(batch.say(0, call.io["user_codes"])[:, :-1], call.expected)


@every_call
def test_a_row_copied_into_another_goes_on_bit_for_bit(name: str) -> None:
    call = recorded(name)
    user = call.io["user_codes"]
    half = call.frames // 2
    batch = Rows(call.lm, 3)
    batch.join(0, prefix_of(call))
    batch.say(0, user[:, :half])

    rows.restore(batch.state, 2, rows.snapshot(batch.state, 0))
    batch.positions[2] = batch.positions[0]
    for codes in user.T[half:]:
        said = batch.step({0: codes, 2: codes})
        assert torch.equal(said[0], said[2])
    for tensor in rows.leaves(batch.state):
        assert torch.equal(tensor[0], tensor[2])


@every_call
def test_ragged_calls_share_rows_and_each_says_what_it_says_alone(name: str) -> None:
    """Four calls over two rows: they join and leave at different ticks and skip some; another prompt beside them."""
    call = recorded(name)
    user = call.io["user_codes"]
    prefix = prefix_of(call)
    other = PrefixCache(call.lm).read(build_prompt(call.lm.config, prefix.prompt.voice, [5, 7, 9]))
    alone = Rows(call.lm, 2)
    alone.join(1, other)
    other_alone = alone.say(1, user.flip(0))

    batch = Rows(call.lm, 2)
    waiting = [(prefix, user), (other, user.flip(0)), (prefix, user[:, : call.frames // 2]), (prefix, user)]
    running: dict[int, tuple[int, Tensor]] = {}
    heard: dict[int, list[Tensor]] = {n: [] for n in range(len(waiting))}
    started, tick = 0, 0
    while started < len(waiting) or running:
        free = next((row for row in range(2) if row not in running), None)
        if free is not None and started < len(waiting) and tick % 3 == 0:
            batch.join(free, waiting[started][0])
            running[free] = started, waiting[started][1]
            started += 1
        talking = {row: n for row, (n, _) in running.items() if (tick + row) % 5}
        if talking:
            frames = {row: running[row][1][:, len(heard[n])] for row, n in talking.items()}
            for row, said in batch.step(frames).items():
                heard[talking[row]].append(said)
        for row, (n, codes) in list(running.items()):
            if len(heard[n]) == codes.shape[1]:
                del running[row]
        tick += 1

    for n in (0, 2, 3):
        said = torch.stack(heard[n], 1)
        assert torch.equal(said[:, :-1], call.expected[:, : said.shape[1] - 1]), f"call {n}"
    assert torch.equal(torch.stack(heard[1], 1), other_alone)


@dataclass(frozen=True, eq=False)
class RecordedSound:
    """One recording with the codec that it went through and came out of."""

    mimi: Mimi
    io: dict[str, Tensor]

    @property
    def frames(self) -> Tensor:
        """[T, 1, 1920]."""
        return self.io["wav"].view(-1, 1, self.mimi.config.frame_samples)

    @property
    def codes(self) -> Tensor:
        """[8, T]."""
        return self.io["codes_streaming"][:CODEBOOKS]


@cache
def recorded_sound(name: str) -> RecordedSound:
    io, about = read(FOLDER / f"mimi_{name}_io.safetensors")
    sizes = json.loads(about["config"])
    mimi = Mimi(MimiConfig.of(sizes, name), CPU)
    load(weights_of("mimi", name, sizes), mimi.entries())
    mimi.pack()
    return RecordedSound(mimi, io)


every_sound = pytest.mark.parametrize("name", names("mimi", "io"))


@every_sound
def test_every_frame_is_encoded_to_the_recorded_codes(name: str) -> None:
    sound = recorded_sound(name)
    state = sound.mimi.state(1)

    codes = [sound.mimi.encode(state, frame, ACTIVE) for frame in sound.frames]

    assert torch.equal(torch.cat(codes).T, sound.codes)


@every_sound
def test_every_latent_is_the_recorded_one(name: str) -> None:
    """Codes would still be equal with an error that is smaller than the distances between centroids."""
    sound = recorded_sound(name)
    state = sound.mimi.state(1)

    latents = [sound.mimi.latent(state, frame, ACTIVE) for frame in sound.frames]

    torch.testing.assert_close(torch.cat(latents).T, sound.io["latent_streaming"], rtol=0, atol=1e-4)


@every_sound
def test_the_recorded_codes_are_decoded_to_the_recorded_sound(name: str) -> None:
    sound = recorded_sound(name)
    state = sound.mimi.state(1)

    pcm = [sound.mimi.decode(state, codes[None], ACTIVE) for codes in sound.codes.T]

    torch.testing.assert_close(torch.cat(pcm, 1), sound.io["pcm_streaming"], rtol=0, atol=1e-5)
