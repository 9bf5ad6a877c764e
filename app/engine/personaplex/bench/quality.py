"""What fewer bytes cost in quality: one call, made by the model as it is, and heard again by each smaller one.

Every model is given the very tokens that the first one said and heard, so that what is compared at each frame is one
answer to the same past: the logits of the text and of each of the agent's codebooks.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.engine.contract import FRAME_SAMPLES, SAMPLE_RATE_HZ, EngineFault, Role
from app.engine.personaplex.bench.report import environment
from app.engine.personaplex.model.calibrate import even_keys
from app.engine.personaplex.model.config import CODEBOOKS
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.model.quantize import Weights
from app.engine.personaplex.model.ring import Kv
from app.engine.personaplex.model.tokenizer import Tokenizer
from app.engine.personaplex.model.weights import Checkpoint, load
from app.engine.personaplex.prefix import Prefix, PrefixCache, build_prompt, inputs, open_call, place
from app.engine.personaplex.runner import VoiceSource
from app.engine.personaplex.voices import CodedVoice, Voice, read_packed_voice

USUAL_KV: Kv = "int8"
"""What calls get on a GPU unless told otherwise."""
HEADS = ("text", *(f"codebook {number}" for number in range(1, CODEBOOKS + 1)))

_SEED = 1
_NOISE = 0.05


@dataclass(frozen=True, slots=True)
class Kinds:
    weights: Weights
    kv: Kv


@dataclass(frozen=True, slots=True)
class Likeness:
    """Means over the frames, one for each of `HEADS`: the cosine between the logits, how often the likeliest token is
    the same, and the Kullback-Leibler divergence of the softmax from the unquantised one, in nats.
    """

    cosine: tuple[float, ...]
    agreement: tuple[float, ...]
    divergence: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one pair of kinds; `fault` says why there is none."""

    kinds: Kinds
    likeness: Likeness | None
    fault: str = ""


@dataclass(frozen=True)
class Quality:
    environment: dict[str, str]
    checkpoint: str
    role: str
    heard: str
    frames: int
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Listening:
    """What a call is made of: the model's files, who answers, where voices are, and what the caller says.

    `pcm`: float32 [N] at 24 kHz, `heard` its name; None: seconds of silence and of noise in turn.
    """

    checkpoint: Checkpoint
    role: Role
    voice: Callable[[str], VoiceSource]
    frames: int
    pcm: NDArray[np.float32] | None = None
    heard: str = "silence and noise"


@dataclass(frozen=True)
class _Script:
    """A call that was made: `columns` int64 [T, 17], and `agent` int64 [T, 9], what the model said at each."""

    columns: Tensor
    agent: Tensor


@dataclass(frozen=True)
class _Logits:
    """Float32 on the host: [T, text_card], [T, 8, card]."""

    text: Tensor
    audio: Tensor

    def heads(self) -> list[Tensor]:
        return [self.text, *self.audio.unbind(1)]


def kinds_to_compare(weights: Sequence[Weights], kv: Sequence[Kv]) -> list[Kinds]:
    """Each kind alone, and the usual way to keep keys and values with each kind of weights."""
    alone = [*(Kinds("bf16", one) for one in kv), *(Kinds(one, "bf16") for one in weights)]
    together = [Kinds(one, USUAL_KV) for one in weights if USUAL_KV in kv]
    return [kinds for kinds in (*alone, *together) if kinds != Kinds("bf16", "bf16")]


def compare(
    listening: Listening,
    kinds: Sequence[Kinds],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str, int, int], object],
) -> Quality:
    """Make the call with the model in `dtype`, and hear it again with each of `kinds`. One model is loaded at a time.

    `progress` is told what is being done now, how many steps are done, and of how many.

    Raises:
        EngineFault: the checkpoint, the voice or the unquantised model cannot be had. A kind that this device cannot
            have is a verdict's fault.
    """
    groups = {weights: [one for one in kinds if one.weights == weights] for weights in get_args(Weights)}
    steps = [(weights, group) for weights, group in groups.items() if group]
    progress("making the call as it is", 0, 1 + len(steps))
    comparison = _Comparison(listening, device, dtype)
    verdicts: list[Verdict] = []
    for done, (weights, group) in enumerate(steps):
        progress(f"hearing it with weights {weights}", 1 + done, 1 + len(steps))
        verdicts += comparison.verdicts(weights, group)
    return Quality(
        environment(device, dtype), str(listening.checkpoint.folder), listening.role.name, listening.heard,
        listening.frames, tuple(verdicts),
    )  # fmt: skip


def as_json(quality: Quality) -> str:
    return json.dumps(asdict(quality) | {"heads": HEADS}, indent=1) + "\n"


def as_lines(quality: Quality) -> list[str]:
    """The figures as lines of Markdown."""
    lines = [f"| weights | kv | | {' | '.join(HEADS)} |", "|---|---|---|" + "---:|" * len(HEADS)]
    for verdict in quality.verdicts:
        kinds, found = f"| {verdict.kinds.weights} | {verdict.kinds.kv} |", verdict.likeness
        if found is None:
            lines.append(f"{kinds} {verdict.fault} |" + " |" * len(HEADS))
            continue
        lines.append(f"{kinds} cosine | {' | '.join(f'{value:.5f}' for value in found.cosine)} |")
        lines.append(f"{kinds} same likeliest | {' | '.join(f'{value:.1%}' for value in found.agreement)} |")
        lines.append(f"{kinds} KL, nats | {' | '.join(f'{value:.5f}' for value in found.divergence)} |")
    made_with = ", ".join(f"{name} {value}" for name, value in quality.environment.items())
    call = f"{quality.frames} frames, persona {quality.role}, heard {quality.heard}"
    return [*lines, "", f"{quality.checkpoint}, {call}; {made_with}"]


def likeness(exact: Sequence[Tensor], other: Sequence[Tensor]) -> Likeness:
    """Of logits [T, V] of each head."""
    pairs = [(one.double(), two.double()) for one, two in zip(exact, other, strict=True)]
    return Likeness(
        tuple(float(functional.cosine_similarity(one, two, -1).mean()) for one, two in pairs),
        tuple(float((one.argmax(-1) == two.argmax(-1)).double().mean()) for one, two in pairs),
        tuple(
            float(functional.kl_div(two.log_softmax(-1), one.log_softmax(-1), reduction="batchmean", log_target=True))
            for one, two in pairs
        ),
    )


def _heard(listening: Listening, device: torch.device) -> tuple[Tensor, CodedVoice | Path]:
    """The caller's codes int64 [T, 8] of every frame, and the voice as far as the codec makes it."""
    mimi = Mimi(listening.checkpoint.mimi_config, device)
    load(listening.checkpoint.mimi, mimi.entries())
    mimi.pack()
    pcm = np.zeros(listening.frames * FRAME_SAMPLES, np.float32)
    sound = _silence_and_noise(len(pcm)) if listening.pcm is None else listening.pcm[: len(pcm)]
    pcm[: len(sound)] = sound
    source = listening.voice(listening.role.voice)
    if isinstance(source, Path):
        return mimi.encode_whole(torch.from_numpy(pcm)).T, source
    voice = CodedVoice(listening.role.voice, mimi.encode_whole(torch.from_numpy(source)).cpu())
    return mimi.encode_whole(torch.from_numpy(pcm)).T, voice


def _silence_and_noise(samples: int) -> NDArray[np.float32]:
    noise = np.random.default_rng(_SEED).normal(0, _NOISE, samples)
    noise[np.arange(samples) // SAMPLE_RATE_HZ % 2 == 0] = 0
    return noise.astype(np.float32)


class _Comparison:
    """A call made by the unquantised model, for others to hear.

    Raises EngineFault where that model cannot be had.
    """

    def __init__(self, listening: Listening, device: torch.device, dtype: torch.dtype) -> None:
        self._listening, self._device, self._dtype = listening, device, dtype
        user, self._voice = _heard(listening, device)
        try:
            model = self._model("bf16")
            self._script = model.speak(user)
            self._exact = model.hear(self._script, "bf16")
        except torch.OutOfMemoryError as error:
            raise EngineFault("the unquantised model does not fit here, and all others are held against it") from error

    def verdicts(self, weights: Weights, kinds: Sequence[Kinds]) -> list[Verdict]:
        """Of kinds with these weights."""
        try:
            model = self._model(weights)
            return [Verdict(one, self._likeness(model, one.kv)) for one in kinds]
        except (EngineFault, torch.OutOfMemoryError) as error:
            reason = str(error).partition("\n")[0]
            return [Verdict(one, None, reason) for one in kinds]

    def _likeness(self, model: "_Model", kv: Kv) -> Likeness:
        return likeness(self._exact.heads(), model.hear(self._script, kv).heads())

    def _model(self, weights: Weights) -> "_Model":
        return _Model(self._listening, self._voice, weights, self._device, self._dtype)


class _Model:
    """The language model with weights of one kind, and a prompt for it."""

    def __init__(
        self,
        listening: Listening,
        voice: CodedVoice | Path,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        checkpoint, role = listening.checkpoint, listening.role
        self._role = role
        self._lm = lm = Lm(checkpoint.lm, device, dtype, weights)
        # Not by way of the file that a service keeps quantised weights in: a comparison leaves nothing behind.
        load(checkpoint.model, lm.entries())
        spoken: Voice = (
            read_packed_voice(voice, checkpoint.lm, lm.initial_embedding()) if isinstance(voice, Path) else voice
        )
        self._prompt = build_prompt(checkpoint.lm, spoken, Tokenizer(checkpoint.tokenizer).role(role.prompt))
        # Exact, so that it may be done for keys that are kept whole, too.
        even_keys(lm, inputs(lm, self._prompt))
        lm.pack()
        self._active = torch.ones(1, dtype=torch.bool, device=device)

    def speak(self, user: Tensor) -> _Script:
        """Answer the caller's codes int64 [T, 8]."""
        lm, role = self._lm, self._role
        state, prefix = self._begun("bf16")
        choice = state.choice
        choice.seed.fill_(_SEED)
        choice.text_temperature.fill_(role.text_temperature)
        choice.text_top_k.fill_(role.text_top_k)
        choice.audio_temperature.fill_(role.audio_temperature)
        choice.audio_top_k.fill_(role.audio_top_k)
        open_call(lm, state, 0, prefix, self._reach(0))
        columns, agent = [], []
        for frame, codes in enumerate(user.split(1)):
            columns.append(torch.cat((state.next_agent, codes[:, :1], state.user_acoustics), 1))
            lm.step(state, codes, self._active, self._reach(frame))
            agent.append(state.next_agent.clone())
        return _Script(torch.cat(columns), torch.cat(agent))

    def hear(self, script: _Script, kv: Kv) -> _Logits:
        """What the model would have said at each frame of a call that another one made."""
        lm = self._lm
        state, _ = self._begun(kv)
        text, audio = [], []
        for frame, (column, said) in enumerate(zip(script.columns.split(1), script.agent.split(1), strict=True)):
            reach = self._reach(frame).longest
            hidden = lm.transformer.step(lm.embed(column), state.kv, state.position, self._active, reach)
            text.append(lm.text_logits(hidden).float().cpu())
            audio.append(self._audio(hidden, said))
            state.position += 1
        return _Logits(torch.cat(text), torch.stack(audio))

    def _audio(self, hidden: Tensor, said: Tensor) -> Tensor:
        """[8, card]; every codebook is given the codes that were said before it."""
        found: list[Tensor] = []

        def forced(codebook: int, logits: Tensor) -> Tensor:
            found.append(logits.float().cpu())
            return said[:, 1 + codebook]

        self._lm.depformer.run(hidden, said[:, 0], forced)
        return torch.cat(found)

    def _begun(self, kv: Kv) -> tuple[LmState, Prefix]:
        lm = self._lm
        state = LmState.of(lm.config, 1, lm.device, lm.dtype, kv)
        prefix = PrefixCache(lm, kv).read(self._prompt)
        place(state, 0, prefix)
        return state, prefix

    def _reach(self, frame: int) -> Reach:
        return Reach(len(self._prompt) + frame + 1, self._role.text_top_k, self._role.audio_top_k)
