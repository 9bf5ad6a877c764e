"""What a step of PersonaPlex's language model costs on this machine's CPU, beside Kyutai's package and as rows join."""

import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.engine.personaplex.model.config import CODEBOOKS, PAD, LmConfig
from app.machine import require_packages

# The command's help must not wait for torch.
if TYPE_CHECKING:
    from torch import Tensor

MODEL = LmConfig(
    dim=1024, num_heads=16, num_layers=8, depformer_dim=512, depformer_num_heads=8, depformer_num_layers=4,
    depformer_dim_feedforward=2112, dep_q=CODEBOOKS,
)  # fmt: skip
"""Sizes between a test's and the real ones, so that it fits a laptop and is still bound by its memory."""
ROWS = (1, 2, 4, 8)
TEXT_TEMPERATURE, TEXT_TOP_K = 0.7, 25
AUDIO_TEMPERATURE, AUDIO_TOP_K = 0.8, 250
MOSHI = "moshi==0.2.13"

_WARM_UP, _ROUNDS = 3, 25
_TEN_SECONDS = 125
_SEED = 7
_BUSY = 0.3
"""Of the cores, taken by others: from here on the figures are theirs as well."""

Step = Callable[[], object]


class _NoWitness(Exception):
    """The other package is not here, and what would bring it."""


@dataclass(frozen=True, slots=True)
class Beside:
    """One row at one moment of its call. `theirs_ms` is None where the other package is missing."""

    moment: str
    ours_ms: float
    theirs_ms: float | None


@dataclass(frozen=True, slots=True)
class EngineCost:
    """Medians. `step_ms` is for each of `ROWS`, ten seconds into their calls; `notes` say what is wrong with it."""

    model: LmConfig
    beside: tuple[Beside, ...]
    step_ms: tuple[float, ...]
    threads: int
    notes: tuple[str, ...]


def bench_moshi(progress: Callable[[str], None], model: LmConfig = MODEL) -> EngineCost:
    """Measure: half a minute and 5 GB of memory, for `MODEL`.

    Both packages take turns step by step in this one process, so that whatever else the machine does is shared fairly.
    Raises EngineFault where torch is missing.
    """
    require_packages()
    import torch

    notes = _busy()
    progress("making a random model ...")
    weights = _random_weights(model)
    try:
        theirs: Step | None = _their_step(model, weights)
    except _NoWitness as missing:
        theirs, notes = None, (*notes, str(missing))
    beside = []
    for moment, position in (("ten seconds into a call", _TEN_SECONDS), ("with a full window", 2 * model.context)):
        progress(f"one row {moment} ...")
        beside.append(_beside(f"one row {moment}", _our_step(model, weights, 1, position), theirs))
    step_ms = []
    for rows in ROWS:
        progress(f"{rows} row{'s' * (rows > 1)} ...")
        step_ms += _medians_ms([_our_step(model, weights, rows, _TEN_SECONDS)])
    return EngineCost(model, tuple(beside), tuple(step_ms), torch.get_num_threads(), notes)


def _beside(moment: str, ours: Step, theirs: Step | None) -> Beside:
    ours_ms, *theirs_ms = _medians_ms([ours, theirs] if theirs is not None else [ours])
    return Beside(moment, ours_ms, theirs_ms[0] if theirs_ms else None)


def table(cost: EngineCost) -> list[str]:
    """The figures as lines of Markdown."""
    lines = ["| | this engine | moshi | share |", "|---|---:|---:|---:|"]
    for one in cost.beside:
        theirs = "- | -" if one.theirs_ms is None else f"{one.theirs_ms:.1f} ms | {one.ours_ms / one.theirs_ms:.2f}"
        lines.append(f"| {one.moment} | {one.ours_ms:.1f} ms | {theirs} |")
    lines += ["", "| rows | a step | of it for each row |", "|---:|---:|---:|"]
    for rows, ms in zip(ROWS, cost.step_ms, strict=True):
        lines.append(f"| {rows} | {ms:.1f} ms | {ms / rows:.1f} ms |")
    return [*lines, "", _made_with(cost.model, cost.threads), *cost.notes]


def _made_with(model: LmConfig, threads: int) -> str:
    main = f"{model.num_layers} layers of width {model.dim}"
    depformer = f"depformer of {model.depformer_num_layers} layers of width {model.depformer_dim}"
    torch, python = importlib.metadata.version("torch"), sys.version.split()[0]
    today = time.strftime("%Y-%m-%d")
    return f"{main}, {depformer}, float32, {threads} threads, torch {torch}, Python {python}, {today}"


def _busy() -> tuple[str, ...]:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < _BUSY * cores:
        return ()
    return (f"The machine was busy when it began (load {load:.1f} on {cores} cores): stop what it does and repeat.",)


def _medians_ms(steps: Sequence[Step]) -> list[float]:
    """Take turns, so that each meets the same moments of the machine."""
    taken_s: list[list[float]] = [[] for _ in steps]
    for turn in range(_WARM_UP + _ROUNDS):
        for step, times_s in zip(steps, taken_s, strict=True):
            began_s = time.perf_counter()
            step()
            if turn >= _WARM_UP:
                times_s.append(time.perf_counter() - began_s)
    return [statistics.median(times_s) * 1000 for times_s in taken_s]


def _random_weights(model: LmConfig) -> dict[str, "Tensor"]:
    """Every tensor of a checkpoint of these sizes, float32."""
    import torch

    from app.engine.personaplex.model.lm import Lm

    draw = torch.Generator().manual_seed(_SEED)
    entries = Lm(model, torch.device("meta"), torch.float32).entries()
    return {key: torch.randn(e.shape, generator=draw).mul_(e.shape[-1] ** -0.5) for key, e in entries.items()}


def _our_step(model: LmConfig, weights: Mapping[str, "Tensor"], rows: int, position: int) -> Step:
    import torch

    from app.engine.personaplex.model.lm import Lm, LmState, Reach

    cpu = torch.device("cpu")
    lm = Lm(model, cpu, torch.float32)
    for key, entry in lm.entries().items():
        assert entry.into is not None, f"{key} is a tensor that a step reads"
        entry.into.copy_(weights[key][: entry.rows].reshape(entry.into.shape))
    lm.pack(rows)
    state = LmState.of(model, rows, cpu, torch.float32)
    state.position.fill_(position)
    state.choice.text_temperature.fill_(TEXT_TEMPERATURE)
    state.choice.text_top_k.fill_(TEXT_TOP_K)
    state.choice.audio_temperature.fill_(AUDIO_TEMPERATURE)
    state.choice.audio_top_k.fill_(AUDIO_TOP_K)
    user, active = torch.zeros(rows, CODEBOOKS, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    reach = Reach(min(model.ring, position + _WARM_UP + _ROUNDS), TEXT_TOP_K, AUDIO_TOP_K)
    return lambda: lm.step(state, user, active, reach)


def _their_step(model: LmConfig, weights: Mapping[str, "Tensor"]) -> Step:
    """Kyutai's generator with the very same weights. Its attention reads the whole window wherever a call is.

    Raises _NoWitness.
    """
    import torch

    try:
        from moshi.models.lm import LMGen, LMModel
        from moshi.utils.compile import no_compile
    except ImportError as error:
        raise _NoWitness(f"Without moshi to compare with ({error}): pip install --no-deps {MOSHI}") from error
    kind: Any = LMModel
    net = kind(
        delays=[0, *2 * [0, *[1] * (CODEBOOKS - 1)]], n_q=2 * CODEBOOKS, dep_q=CODEBOOKS, card=model.card,
        text_card=model.text_card, dim=model.dim, num_heads=model.num_heads, num_layers=model.num_layers,
        hidden_scale=model.hidden_scale, norm="rms_norm_f32", gating="silu", causal=True, layer_scale=None,
        context=model.context, max_period=model.max_period, positional_embedding="rope",
        existing_text_padding_id=PAD, depformer_dim=model.depformer_dim,
        depformer_num_heads=model.depformer_num_heads, depformer_num_layers=model.depformer_num_layers,
        depformer_multi_linear=True, depformer_dim_feedforward=model.depformer_dim_feedforward,
        depformer_gating="silu", depformer_pos_emb="none", depformer_weights_per_step=True,
        device="meta", dtype=torch.float32,
    )  # fmt: skip
    net.load_state_dict(dict(weights), assign=True)
    net.eval()
    gen: Any = LMGen(net, temp=AUDIO_TEMPERATURE, temp_text=TEXT_TEMPERATURE, top_k=AUDIO_TOP_K, top_k_text=TEXT_TOP_K)
    gen.streaming_forever(1)
    user = torch.zeros(1, CODEBOOKS, 1, dtype=torch.int64)

    def step() -> object:
        # What it would compile needs a C++ compiler, and is no faster on a CPU.
        with no_compile():
            return gen.step(user)

    return step
