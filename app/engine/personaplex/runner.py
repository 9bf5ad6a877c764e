"""PersonaPlexRunner: many calls as rows of one batch, each frame through codec, language model and codec again."""

import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.contract import FRAME_SAMPLES, EngineFault, Pcm, Role, Spoken
from app.engine.personaplex.admission import admit, key_of
from app.engine.personaplex.model import rows as state_rows
from app.engine.personaplex.model.calibrate import even_keys
from app.engine.personaplex.model.config import CODEBOOKS
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.mimi import DecoderState, Mimi, MimiState
from app.engine.personaplex.model.quantize import Weights, load_model
from app.engine.personaplex.model.ring import Kv, Ring
from app.engine.personaplex.model.tokenizer import Tokenizer
from app.engine.personaplex.model.weights import Checkpoint, load
from app.engine.personaplex.prefix import Prefix, PrefixCache, build_prompt, inputs, open_call, place
from app.engine.personaplex.rebuild import HANDOFF_FRAMES, Rebuilder
from app.engine.personaplex.seat import AUDIBLE_RMS, Seat
from app.engine.personaplex.tick import Tick
from app.engine.personaplex.voices import CodedVoice, Voice, read_packed_voice

VoiceSource = Path | NDArray[np.float32]
"""A packed voice (.pt), or its sound: mono at 24 kHz and -24 LUFS."""
Window = Literal["rebuild", "slide"]

DEFAULT_VOICE = Role("", "").voice

_USUAL_FRAMES = 64
_REHEARSED_FRAMES = (1, 16, 32, 64, 128, 256)

_log = logging.getLogger("personaline.engine")


class PersonaPlexRunner:
    """A Runner. `warm_up` loads the weights; nothing is allocated before."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
        voice: Callable[[str], VoiceSource],
        window: Window = "rebuild",
        seed: int | None = None,
        weights: Weights = "bf16",
        kv: Kv = "bf16",
        graphs: bool = True,
        measured: Path | None = None,
    ) -> None:
        """
        Args:
            rows: the most calls at once; `warm_up` may find that fewer can be carried.
            dtype: what is computed in; "bf16" weights and keys are of this dtype as well.
            voice: from a role's voice to where its sound is; raises EngineFault for one that is not there.
            window: how a call goes on beyond the model's window: "rebuild" keeps the prompt in it, "slide" loses it.
            seed: the same for every call, to be able to repeat one. None: each call its own.
            weights, kv: how they are kept.
            graphs: whether an NVIDIA GPU runs a tick as one CUDA graph.
            measured: where measured ticks are kept, for the next start. None: `rows` are taken as they are.
        """
        self.rows = rows
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self._weights, self._kv, self._with_graphs, self._measured = weights, kv, graphs, measured
        self._voice_source, self._window, self._seed = voice, window, seed
        self._seats: list[Seat | None] = []
        self._voices: dict[str, Voice] = {}
        self._ready = False
        self._tokenizer: Tokenizer

    def warm_up(self, roles: Sequence[Role]) -> None:
        """Load the weights, capture the tick, see how many calls it carries, and read these roles' prompts.

        Raises EngineFault.
        """
        try:
            self._load(roles)
            self._rehearse()
            self._tick.warm_up()
            if self._measured is not None:
                self._admit(self._measured)
            self._seat_rows()
            for role in roles:
                self._prefix(role)
            self._prefixes.make_room()
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            raise EngineFault(f"{reason}; fewer ROWS take less, and personaline doctor says how many fit") from error
        self._ready = True

    def _load(self, roles: Sequence[Role]) -> None:
        checkpoint, device = self._checkpoint, self._device
        self._tokenizer = Tokenizer(checkpoint.tokenizer)
        if self._tokenizer.size != checkpoint.lm.text_card:
            found = f"{self._tokenizer.size} tokens where the model has {checkpoint.lm.text_card}"
            raise EngineFault(f"{checkpoint.tokenizer}: {found}; download the model again")
        self._lm = Lm(checkpoint.lm, device, self._dtype, self._weights)
        load_model(checkpoint.model, self._lm.entries(), self._weights)
        self._mimi = Mimi(checkpoint.mimi_config, device)
        load(checkpoint.mimi, self._mimi.entries())
        self._mimi.pack()
        if self._kv != "bf16":
            even_keys(self._lm, self._usual_inputs(roles))
        self._lm.pack(self.rows)
        self._lm_state = LmState.of(checkpoint.lm, self.rows, device, self._dtype, self._kv)
        self._mimi_state: MimiState = self._mimi.state(self.rows)
        self._tick = Tick(self._lm, self._mimi, self._lm_state, self._mimi_state, self._with_graphs)
        self._silenced = self._after_silence()
        self._prefixes = PrefixCache(self._lm, self._kv)

    def _rehearse(self) -> None:
        """Have a GPU read passes of several lengths: each kind of kernel is compiled or loaded when first used, and no
        call shall wait for that.
        """
        if self._device.type != "cuda":
            return
        lm = self._lm
        for frames in _REHEARSED_FRAMES:
            scratch = Ring.of(lm.config, 1, frames, self._device, self._lm_state.kv.values.dtype)
            lm.transformer.extend(torch.zeros(frames, lm.config.dim, device=self._device, dtype=lm.dtype), scratch, 0)

    def _admit(self, measured: Path) -> None:
        """Take as many calls as the tick carries in time, if that is fewer than there is memory for."""
        lm, mimi = self._checkpoint.lm, self._checkpoint.mimi_config
        key = key_of(self._device, self._dtype, lm, mimi, self._weights, self._kv, self._with_graphs)
        self.rows = admit(self._tick, self._lm_state, self.rows, measured, key).calls

    def _seat_rows(self) -> None:
        """What the host knows of each row, none of which has a call."""
        self._seats = [None] * self.rows
        self._positions = np.zeros(self.rows, np.int64)
        self._prompt_frames = np.zeros(self.rows, np.int64)
        self._ranks = np.ones((self.rows, 2), np.int64)
        self._rebuilder = Rebuilder(self._lm, self._lm_state, self._positions, self._prompt_frames)

    def join(self, row: int, role: Role) -> None:
        prefix = self._prefix(role)
        state_rows.clear(self._lm_state, row)
        state_rows.clear(self._mimi_state, row)
        state_rows.restore(self._mimi_state.decoder, row, self._silenced)
        seed = secrets.randbits(63) if self._seed is None else self._seed
        self._seats[row] = seat = Seat(seed, self._tokenizer)
        self._lm_state.choice.seed[row] = seed
        self._choose_as(row, role)
        seat.greet(role)
        self._guide_row(row, seat)
        self._place(row, prefix)
        open_call(self._lm, self._lm_state, row, prefix, Reach(1, *map(int, self._ranks[row])))

    def leave(self, row: int) -> None:
        self._seats[row] = None
        self._rebuilder.drop(row)

    def say(self, row: int, text: str, start_within_ms: int | None) -> None:
        if (seat := self._seats[row]) is not None:
            seat.queue(text, start_within_ms)

    def change(self, row: int, role: Role) -> None:
        if (seat := self._seats[row]) is None:
            return
        prefix = self._prefix(role)
        self._choose_as(row, role)
        if not self._rebuilder.hand_off(row, prefix):
            self._place(row, prefix)
        seat.greet(role)

    def step(self, pcm: Pcm, active: NDArray[np.bool_]) -> list[Spoken | None]:
        """Raises ValueError for arrays of any other shape than [rows, 1920] and [rows]."""
        if pcm.shape != (self.rows, FRAME_SAMPLES) or active.shape != (self.rows,):
            right = f"[{self.rows}, {FRAME_SAMPLES}] and [{self.rows}]"
            raise ValueError(f"step: found pcm {list(pcm.shape)}, active {list(active.shape)}; {right} are right")
        for row, seat in self._seated():
            self._guide_row(row, seat)
        speech, tokens, taken = self._tick(pcm, active, self._reach(active))
        self._positions += active
        audible = np.sqrt(np.mean(np.square(speech), axis=1)) > AUDIBLE_RMS
        spoken: list[Spoken | None] = [None] * self.rows
        for row, seat in self._seated():
            if active[row]:
                spoken[row] = seat.frame(speech[row], bool(audible[row]), int(tokens[row]), int(taken[row]))
        return spoken

    def between(self) -> None:
        if self._window == "rebuild":
            for row, seat in self._seated():
                self._rebuilder.watch(row, seat.seed)
        self._rebuilder.work()
        self._prefixes.make_room()

    def close(self) -> None:
        for name in ("_tick", "_lm", "_mimi", "_lm_state", "_mimi_state", "_silenced", "_prefixes", "_rebuilder"):
            self.__dict__.pop(name, None)
        self._voices.clear()
        self._seats = [None] * self.rows

    def _reach(self, active: NDArray[np.bool_]) -> Reach:
        text_ranks, audio_ranks = self._ranks[active].max(axis=0, initial=1)
        return Reach(int(self._positions[active].max(initial=0)) + 1, int(text_ranks), int(audio_ranks))

    def _seated(self) -> list[tuple[int, Seat]]:
        return [(row, seat) for row, seat in enumerate(self._seats) if seat is not None]

    def _prefix(self, role: Role) -> Prefix:
        prefix = self._prefixes.of(self._voice(role), self._tokenizer.role(role.prompt))
        length = len(prefix.prompt)
        if length > self._lm.config.ring:
            found = f"its prompt takes {length} frames of a window of {self._lm.config.ring}"
            _log.warning("persona %s: %s; the model does not see the beginning", role.name, found)
        elif self._rebuilder.kept_frames(length) < HANDOFF_FRAMES < self._lm.config.ring // 2:
            found = f"its prompt takes {length} frames of a window of {self._lm.config.ring}"
            _log.warning("persona %s: %s; little is left for the conversation", role.name, found)
        return prefix

    def _voice(self, role: Role) -> Voice:
        """A voice that cannot be had stops the start; a call that is there already gets another one."""
        try:
            return self._voice_named(role.voice)
        except EngineFault as fault:
            if not self._ready:
                raise
            other = next(iter(self._voices), DEFAULT_VOICE)
            _log.error("persona %s speaks with the voice %s instead: %s", role.name, other, fault)
            return self._voice_named(other)

    def _voice_named(self, name: str) -> Voice:
        if name not in self._voices:
            self._voices[name] = self._read_voice(name)
        return self._voices[name]

    def _read_voice(self, name: str) -> Voice:
        source = self._voice_source(name)
        if isinstance(source, Path):
            return read_packed_voice(source, self._checkpoint.lm, self._lm.initial_embedding())
        return CodedVoice(name, self._mimi.encode_whole(torch.from_numpy(source)).cpu())

    def _place(self, row: int, prefix: Prefix) -> None:
        place(self._lm_state, row, prefix)
        self._positions[row] = self._prompt_frames[row] = len(prefix.prompt)

    def _choose_as(self, row: int, role: Role) -> None:
        self._ranks[row] = (
            role.text_top_k if role.text_temperature > 0 else 1,
            role.audio_top_k if role.audio_temperature > 0 else 1,
        )
        choice = self._lm_state.choice
        choice.text_temperature[row], choice.text_top_k[row] = role.text_temperature, role.text_top_k
        choice.audio_temperature[row], choice.audio_top_k[row] = role.audio_temperature, role.audio_top_k

    def _guide_row(self, row: int, seat: Seat) -> None:
        """Give the row's guide the next words that wait for it, if it has none."""
        if (guided := seat.next_guided()) is None:
            return
        guide = self._lm_state.guide
        guide.tokens[row, : len(guided.tokens)] = torch.tensor(guided.tokens, device=self._device)
        guide.taken[row] = 0
        guide.length[row], guide.within[row] = len(guided.tokens), guided.within_frames

    def _usual_inputs(self, roles: Sequence[Role]) -> Tensor:
        """What the model mostly meets, [T, D]: the first role's prompt, or silence where there is none."""
        if roles:
            voice, text = self._voice(roles[0]), self._tokenizer.role(roles[0].prompt)
        else:
            silence = torch.tensor(self._lm.config.silence_tokens)[:, None]
            voice, text = CodedVoice("silence", silence.expand(CODEBOOKS, _USUAL_FRAMES)), []
        return inputs(self._lm, build_prompt(self._lm.config, voice, text))

    def _after_silence(self) -> DecoderState:
        """The decoder as it is after the prompt's last frame, its silence: where every call begins."""
        state = self._mimi.state(1)
        silence = torch.tensor([self._lm.config.silence_tokens], device=self._device)
        self._mimi.decode(state, silence, torch.ones(1, dtype=torch.bool, device=self._device))
        return state.decoder
