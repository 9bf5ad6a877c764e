"""A persona's prompt as model state: columns of tokens, one parallel pass over them, and a cache of the results.

Every token of a prompt is known beforehand, so its keys and values depend on nothing that a call brings: they are made
once, without the depformer, and copied into the row of each call.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.personaplex.model import rows
from app.engine.personaplex.model.config import CODEBOOKS, COLUMN_ROWS, PAD, LmConfig
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.ring import Kv, Ring, kv_dtype
from app.engine.personaplex.sizes import HOT_FRAMES, PASS_FRAMES
from app.engine.personaplex.voices import PackedVoice, Voice

COLD_FRAMES = 4_000
"""Frames kept on the host, 2 GB in bfloat16."""
_Key = tuple[int, tuple[int, ...]]
_UNKNOWN = -2
_AGENT = slice(1, 1 + CODEBOOKS)
_AGENT_ACOUSTICS = slice(2, 1 + CODEBOOKS)
_USER_ACOUSTICS = slice(2 + CODEBOOKS, COLUMN_ROWS)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Everything that is fed before a call's first frame.

    `columns` int64 [T, 17]: text, the agent's codes, the user's codes of each position; where a packed voice brings
    finished inputs instead, `embeddings` [V - 1, D], the first V - 1 columns are -2.
    """

    voice: Voice
    columns: Tensor
    embeddings: Tensor | None

    def __len__(self) -> int:
        return len(self.columns)

    def shared(self, other: "Prompt") -> int:
        """How many first positions are the same in both."""
        if self.voice is not other.voice:
            return 0
        length = min(len(self), len(other))
        same = (self.columns[:length] == other.columns[:length]).all(1)
        return length if bool(same.all()) else int(same.to(torch.int8).argmin())


def build_prompt(config: LmConfig, voice: Voice, text: Sequence[int]) -> Prompt:
    """The hybrid prompt: the voice, silence, the role's text a token a frame, silence; a tone on the user's side.

    Acoustic codes lag their frame by one position, as everywhere, so the first position has none of a frame: it and
    the acoustics of the second are the initial tokens. Source: PersonaPlex (NVIDIA, 2026), and Moshi's delays.
    """
    packed = voice if isinstance(voice, PackedVoice) else None
    spoken = torch.empty(CODEBOOKS, voice.frames, dtype=torch.int64) if isinstance(voice, PackedVoice) else voice.codes
    silence = torch.tensor(config.silence_tokens)[:, None]
    pause = [PAD] * config.silence_frames
    texts = torch.tensor([PAD] * voice.frames + pause + list(text) + pause)
    agent = torch.cat((spoken, silence.expand(-1, len(texts) - voice.frames)), 1).T
    columns = _delayed(config, texts, agent)
    if packed is not None:
        last = packed.frames - 1
        columns[:last] = _UNKNOWN
        columns[last] = packed.last_column
        if last + 1 < len(columns):
            columns[last + 1, _AGENT_ACOUSTICS] = packed.next_acoustics[: CODEBOOKS - 1]
            columns[last + 1, _USER_ACOUSTICS] = packed.next_acoustics[CODEBOOKS - 1 :]
    return Prompt(voice, columns, packed.embeddings if packed is not None else None)


def _delayed(config: LmConfig, texts: Tensor, agent: Tensor) -> Tensor:
    """Columns [T, 17] of the frames' texts [T] and agent codes [T, 8]; the user hears a tone."""
    columns = torch.empty(len(texts), COLUMN_ROWS, dtype=torch.int64)
    columns[:, 0] = texts
    columns[:, _AGENT] = agent
    columns[:, 1 + CODEBOOKS :] = torch.tensor(config.sine_tokens)
    for acoustics in (_AGENT_ACOUSTICS, _USER_ACOUSTICS):
        columns[1:, acoustics] = columns[:-1, acoustics].clone()
        columns[:2, acoustics] = config.audio_initial
    columns[0] = config.audio_initial
    columns[0, 0] = config.text_initial
    return columns


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that the model has read.

    `kv` of one row, in the order of positions and as the rows' rings keep it; `hidden` [1, D] of the last one, from
    which each call draws its own first tokens.
    """

    prompt: Prompt
    kv: Ring
    hidden: Tensor


class PrefixCache:
    """The prefixes of the latest prompts: the hottest on the device, colder ones on the host. Engine thread only."""

    def __init__(self, lm: Lm, kv: Kv = "bf16") -> None:
        """`kv`: as the rows keep theirs."""
        self._lm, self._kv_dtype = lm, kv_dtype(kv, lm.dtype)
        self._hot: OrderedDict[_Key, Prefix] = OrderedDict()
        self._cold: OrderedDict[_Key, Prefix] = OrderedDict()

    def of(self, voice: Voice, text: Sequence[int]) -> Prefix:
        """The prefix of this voice and role, on the device: kept, or read now in one pass.

        Where the beginning is that of a prefix that is kept, only the rest is read.
        """
        key = (id(voice), tuple(text))
        prefix = self._hot.pop(key, None)
        if prefix is None:
            cold = self._cold.get(key)
            prefix = self._moved(cold) if cold else self.read(build_prompt(self._lm.config, voice, text))
        self._hot[key] = prefix
        return prefix

    def read(self, prompt: Prompt) -> Prefix:
        """Parallel passes over what no kept prefix shares. Blocks for their length: some ten milliseconds on a GPU."""
        lm, length = self._lm, len(prompt)
        kept = [*self._hot.values(), *self._cold.values()]
        base = max(kept, key=lambda one: one.prompt.shared(prompt), default=None)
        # The last position is always read again: its hidden state is what a call opens from.
        start = min(base.prompt.shared(prompt), length - 1) if base is not None else 0
        kv = Ring.of(lm.config, 1, length, lm.device, self._kv_dtype)
        if base is not None:
            kv.first(start).copy_(base.kv.first(start))
        fed = inputs(lm, prompt)
        for begin in range(start, length, PASS_FRAMES):
            hidden = lm.transformer.extend(fed[begin : begin + PASS_FRAMES], kv, begin)
        return Prefix(prompt, kv, hidden[-1:].clone())

    def _moved(self, prefix: Prefix) -> Prefix:
        return Prefix(prefix.prompt, prefix.kv.to(self._lm.device), prefix.hidden)

    def make_room(self) -> None:
        """Let those go that were used longest ago; the one used last stays hot whatever its length. For a moment in
        which no caller waits: the first time that one goes, its copy is made on the host.
        """
        while len(self._hot) > 1 and _frames(self._hot) > HOT_FRAMES:
            key, prefix = self._hot.popitem(last=False)
            if (kept := self._cold.pop(key, None)) is None:
                kv = prefix.kv.to(torch.device("cpu"))
                kv = kv.pinned() if self._lm.device.type == "cuda" else kv
                kept = Prefix(prefix.prompt, kv, prefix.hidden)
            self._cold[key] = kept
        while _frames(self._cold) > COLD_FRAMES:
            self._cold.popitem(last=False)


def _frames(kept: OrderedDict[_Key, Prefix]) -> int:
    return sum(len(prefix.prompt) for prefix in kept.values())


def inputs(lm: Lm, prompt: Prompt) -> Tensor:
    """What the transformer is fed for each position of a prompt, [T, D] on the device."""
    ready = prompt.embeddings
    if ready is None:
        return lm.embed(prompt.columns.to(lm.device))
    rest = lm.embed(prompt.columns[len(ready) :].to(lm.device))
    return torch.cat((ready.to(rest), rest))


def place(state: LmState, row: int, prefix: Prefix) -> None:
    """Put a prompt into a row: the position to come is the one behind it. What else the row holds stays."""
    length, ring = len(prefix.prompt), state.kv.slots
    columns = prefix.prompt.columns.to(state.history)
    if length <= ring:
        state.kv.row(row).first(length).copy_(prefix.kv)
        state.history[row, :length] = columns
    else:
        kept = torch.arange(length - ring, length, device=columns.device)
        state.kv.row(row).copy_slots(kept % ring, prefix.kv, kept)
        state.history[row, kept % ring] = columns[kept]
    state.position[row] = length


def open_call(lm: Lm, state: LmState, row: int, prefix: Prefix, reach: Reach) -> None:
    """Draw the first text and semantic code of a row that has just been given this prompt.

    The acoustic codes of that position are still the prompt's: its last silence and tone lag by one frame.
    """
    choice, guide = rows.snapshot(state.choice, row), rows.snapshot(state.guide, row)
    state.next_agent[row, :2] = lm.open(choice, guide, prefix.hidden, reach)[0]
    rows.restore(state.guide, row, guide)
    state.next_agent[row, 2:] = torch.tensor(lm.config.silence_tokens[1:], device=lm.device)
    state.user_acoustics[row] = torch.tensor(lm.config.sine_tokens[1:], device=lm.device)
    state.choice.drawn[row] += 1
