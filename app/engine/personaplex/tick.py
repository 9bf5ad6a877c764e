"""One tick of all rows on the device: a frame of sound in, a frame of sound and its tokens out.

On an NVIDIA GPU the whole tick is one CUDA graph, captured beforehand for a few numbers of rows: thousands of small
operations are then started at once, and the host only copies one buffer each way. All that may change from tick to
tick, settings of a row included, is in tensors that the graph reads, so nothing is ever captured again.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.engine.contract import FRAME_SAMPLES, EngineFault, Pcm
from app.engine.personaplex.model import rows
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.mimi import Mimi, MimiState

TEXT_RANKS = 1_000
"""The largest top-k for text that a captured tick knows. For sound it knows every code."""

_WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_WARM_UPS = 2

Said = tuple[Pcm, NDArray[np.int64], NDArray[np.int64]]


def widths_for(most: int) -> tuple[int, ...]:
    """For how many first rows a tick is captured."""
    return (*(width for width in _WIDTHS if width < most), most)


class Tick:
    """Engine thread only. The states' tensors must stay where they are."""

    def __init__(self, lm: Lm, mimi: Mimi, lm_state: LmState, mimi_state: MimiState, graphs: bool) -> None:
        """`graphs` False, or any device but an NVIDIA GPU: every operation is started by itself."""
        self._lm, self._mimi, self._lm_state, self._mimi_state = lm, mimi, lm_state, mimi_state
        self.rows = len(lm_state.position)
        self._on_gpu = lm.device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph] | None = {} if graphs and self._on_gpu else None
        # A narrower step rounds otherwise: on a CPU nobody's words shall depend on who else is there.
        self.widths = widths_for(self.rows) if self._on_gpu else (self.rows,)
        c = lm.config
        self._widest = Reach(c.ring, min(TEXT_RANKS, c.text_card), c.card)
        # Float32 holds tokens exactly, and one dtype makes one copy each way.
        self._heard = torch.zeros(self.rows, FRAME_SAMPLES + 1, device=lm.device)
        self._said = torch.zeros(self.rows, FRAME_SAMPLES + 2, device=lm.device)
        self._heard_host = torch.zeros(self._heard.shape, pin_memory=self._on_gpu)
        self._said_host = torch.zeros(self._said.shape, pin_memory=self._on_gpu)
        self._done = torch.cuda.Event(blocking=True) if self._on_gpu else None

    def warm_up(self) -> None:
        """Make ready for calls: capture every width, or step once. No row may have a call.

        Raises EngineFault when a tick cannot be captured.
        """
        if self._graphs is None:
            self(np.zeros((self.rows, FRAME_SAMPLES), np.float32), np.zeros(self.rows, np.bool_), self._widest)
            return
        self._heard.zero_()
        # On one stream and in one pool, the widest first: the others find their memory in what it left.
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        for width in reversed(self.widths):
            self._graphs[width] = self._captured(width, stream, pool)
        torch.cuda.empty_cache()

    def __call__(self, pcm: Pcm, active: NDArray[np.bool_], reach: Reach) -> Said:
        """Advance every active row by a frame; blocks until what they say is on the host.

        Args:
            pcm: float32 [N, 1920] for the first N rows; the others, if there are more, have no call.
            active: bool [N].
            reach: what the host knows of the active rows.

        Returns:
            float32 [S, 1920] in [-1, 1], text tokens int64 [S] and guided tokens given out so far int64 [S], all its
            own. Rows that are not active: meaningless.
        """
        width = self._width(active)
        heard = self._heard_host.numpy()
        given = min(width, len(pcm))
        heard[:given, :FRAME_SAMPLES], heard[:given, FRAME_SAMPLES] = pcm[:given], active[:given]
        heard[given:width] = 0
        self._heard[:width].copy_(self._heard_host[:width], non_blocking=self._on_gpu)
        if self._graphs is None:
            self._step(width, reach)
        else:
            self._graphs[width].replay()
        self._said_host[:width].copy_(self._said[:width], non_blocking=self._on_gpu)
        if self._done is not None:
            self._done.record()
            self._done.synchronize()
        said = self._said_host.numpy()
        tokens = said[:, FRAME_SAMPLES:].astype(np.int64)
        return said[:, :FRAME_SAMPLES].copy(), tokens[:, 0], tokens[:, 1]

    def _width(self, active: NDArray[np.bool_]) -> int:
        highest = int(np.flatnonzero(active).max(initial=0))
        return next(width for width in self.widths if width > highest)

    def _step(self, width: int, reach: Reach) -> None:
        """From `_heard` to `_said` of the first rows, without a word from the host."""
        whole = width == self.rows
        lm_state = self._lm_state if whole else rows.first(self._lm_state, width)
        mimi_state = self._mimi_state if whole else rows.first(self._mimi_state, width)
        pcm, moves = self._heard[:width].split((FRAME_SAMPLES, 1), 1)
        active = moves[:, 0] > 0
        codes = self._mimi.encode(mimi_state, pcm, active)
        frame = self._lm.step(lm_state, codes, active, reach)
        speech = self._mimi.decode(mimi_state, frame[:, 1:], active).clamp(-1, 1)
        words = torch.stack((frame[:, 0], lm_state.guide.taken), 1)
        self._said[:width].copy_(torch.cat((speech, words.to(speech.dtype)), 1))

    def _captured(self, width: int, stream: "torch.cuda.Stream", pool: Any) -> "torch.cuda.CUDAGraph":
        graph = torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Kernels are compiled and libraries take their memory before anything is recorded.
                for _ in range(_WARM_UPS):
                    self._step(width, self._widest)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._step(width, self._widest)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(_first(error)).partition("\n")[0]
            remedy = "PERSONAPLEX_GRAPHS=0 (--no-graphs) runs it without"
            found = f"a tick of {width} calls cannot be captured as a CUDA graph ({reason})"
            raise EngineFault(f"{found}; {remedy}") from error
        return graph


def _first(error: BaseException) -> BaseException:
    """What went wrong first: ending a capture that has failed fails too, and hides the reason."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error
