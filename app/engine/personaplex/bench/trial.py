"""A model made for measuring, of a checkpoint or of random weights in its place, and rows of calls of any length."""

import time

import numpy as np
import torch

from app.engine.contract import FRAME_SAMPLES
from app.engine.personaplex.bench.random_weights import fill_ring, fill_weights
from app.engine.personaplex.bench.roofline import Work, work
from app.engine.personaplex.model import rows as state_rows
from app.engine.personaplex.model.config import CODEBOOKS, PAD, LmConfig, MimiConfig
from app.engine.personaplex.model.lm import Lm, LmState
from app.engine.personaplex.model.mimi import DecoderState, Mimi, MimiState
from app.engine.personaplex.model.quantize import Weights, load_model
from app.engine.personaplex.model.ring import Kv, Ring, kv_dtype
from app.engine.personaplex.model.weights import Checkpoint, load
from app.engine.personaplex.prefix import Prefix, PrefixCache, build_prompt, open_call, place
from app.engine.personaplex.tick import Tick
from app.engine.personaplex.timing import choose_as_usual, finish, time_ticks, usual_reach
from app.engine.personaplex.voices import CodedVoice

PROMPT_FRAMES = 250
"""A voice of some five seconds and a role of about a hundred words."""
_JOINS = 10


class Networks:
    """Language model and codec, ready to run, and what their ticks cannot do without."""

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        device: torch.device,
        dtype: torch.dtype,
        weights: Weights,
        kv: Kv,
        rows: int,
    ) -> None:
        """`checkpoint` None: the real sizes, random. `rows`: how many will mostly step together."""
        lm_config, mimi_config = (checkpoint.lm, checkpoint.mimi_config) if checkpoint else (LmConfig(), MimiConfig())
        self.kv, self.lm, self.mimi = kv, Lm(lm_config, device, dtype, weights), Mimi(mimi_config, device)
        entries = self.lm.entries(), self.mimi.entries()
        if checkpoint is None:
            for part in entries:
                fill_weights(part, device, dtype)
        else:
            load_model(checkpoint.model, entries[0], weights)
            load(checkpoint.mimi, entries[1])
        empty = Ring.of(lm_config, 1, 1, torch.device("meta"), kv_dtype(kv, dtype))
        self.work: Work = work(lm_config, mimi_config, *entries, empty)
        self.lm.pack(rows)
        self.mimi.pack()


class Trial:
    """Room for so many calls, and ticks of them captured where that is wanted. Engine thread only.

    Raises EngineFault when a tick cannot be captured, torch.OutOfMemoryError.
    """

    def __init__(self, networks: Networks, rows: int, graphs: bool) -> None:
        self.rows, self._networks = rows, networks
        lm = networks.lm
        self._lm_state = LmState.of(lm.config, rows, lm.device, lm.dtype, networks.kv)
        self._mimi_state = networks.mimi.state(rows)
        fill_ring(self._lm_state.kv)
        self._tick = Tick(lm, networks.mimi, self._lm_state, self._mimi_state, graphs)
        self._tick.warm_up()

    @property
    def row_bytes(self) -> int:
        """The state of one call."""
        leaves = (*state_rows.leaves(self._lm_state), *state_rows.leaves(self._mimi_state))
        return sum(tensor[0].nbytes for tensor in leaves)

    def time_ticks(self, calls: int, context: int, frames: int) -> list[float]:
        """Milliseconds of each of so many ticks of so many calls, `context` positions each."""
        tick, lm_state, mimi_state = self._ticking(calls)
        for half in (mimi_state.encoder, mimi_state.decoder):
            half.position.fill_(self._networks.mimi.config.downsample * context)
        return time_ticks(tick, lm_state, calls, context, frames)

    def time_starts(self, calls: int, context: int) -> list[float]:
        """Milliseconds from a call's joining, its prompt of `PROMPT_FRAMES` read before, until its first frame is out:
        the last of so many calls, the others with `context` positions each.
        """
        tick, lm_state, mimi_state = self._ticking(calls)
        prefix, silenced = self._prefix(), self._after_silence()
        choose_as_usual(lm_state, calls)
        pcm, active = np.zeros((tick.rows, FRAME_SAMPLES), np.float32), np.arange(tick.rows) < calls
        others, row = max(len(prefix.prompt), context), calls - 1
        times_ms = []
        for _ in range(1 + _JOINS):
            lm_state.position[:calls] = others
            finish(self._networks.lm.device)
            began_s = time.perf_counter()
            self._join(lm_state, mimi_state, row, prefix, silenced)
            tick(pcm, active, usual_reach(others))
            times_ms.append((time.perf_counter() - began_s) * 1000)
        return times_ms[1:]

    def _ticking(self, calls: int) -> tuple[Tick, LmState, MimiState]:
        """What steps so many first rows. On a GPU one tick knows several widths; elsewhere it always steps them all."""
        networks, lm_state, mimi_state = self._networks, self._lm_state, self._mimi_state
        if calls == self.rows or networks.lm.device.type == "cuda":
            return self._tick, lm_state, mimi_state
        lm_state, mimi_state = state_rows.first(lm_state, calls), state_rows.first(mimi_state, calls)
        return Tick(networks.lm, networks.mimi, lm_state, mimi_state, graphs=False), lm_state, mimi_state

    def _prefix(self) -> Prefix:
        lm = self._networks.lm
        frames = min(PROMPT_FRAMES, lm.config.ring)
        voice = CodedVoice("bench", torch.zeros(CODEBOOKS, max(1, frames // 4), dtype=torch.int64))
        words = max(0, frames - voice.frames - 2 * lm.config.silence_frames)
        return PrefixCache(lm, self._networks.kv).read(build_prompt(lm.config, voice, [PAD] * words))

    def _after_silence(self) -> DecoderState:
        lm, mimi = self._networks.lm, self._networks.mimi
        state = mimi.state(1)
        silence = torch.tensor([lm.config.silence_tokens], device=lm.device)
        mimi.decode(state, silence, torch.ones(1, dtype=torch.bool, device=lm.device))
        return state.decoder

    def _join(self, lm_state: LmState, mimi_state: MimiState, row: int, prefix: Prefix, silenced: DecoderState) -> None:
        """As a runner lets a call join."""
        state_rows.clear(lm_state, row)
        state_rows.clear(mimi_state, row)
        state_rows.restore(mimi_state.decoder, row, silenced)
        lm_state.choice.seed[row] = row
        choose_as_usual(state_rows.first(lm_state, row + 1), row + 1)
        place(lm_state, row, prefix)
        open_call(self._networks.lm, lm_state, row, prefix, usual_reach(len(prefix.prompt)))
