"""The bench runs on a checkpoint that a test can make, counts what it says, and needs nothing else of ours."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app.engine.contract import EngineFault, Pcm
from app.engine.personaplex.bench.__main__ import main
from app.engine.personaplex.bench.cold_start import ColdStart, Load, cold_start
from app.engine.personaplex.bench.memory import anonymous_bytes
from app.engine.personaplex.bench.random_weights import fill_ring, fill_weights
from app.engine.personaplex.bench.report import Point, Report, as_json, as_lines
from app.engine.personaplex.bench.roofline import Floor, Limits, work
from app.engine.personaplex.bench.run import Options, run
from app.engine.personaplex.bench.trial import Networks, Trial
from app.engine.personaplex.model.config import CODEBOOKS, LmConfig, MimiConfig
from app.engine.personaplex.model.lm import Lm, LmState, Reach
from app.engine.personaplex.model.mimi import Mimi
from app.engine.personaplex.model.quantize import Weights
from app.engine.personaplex.model.ring import Kv, Ring, kv_dtype
from app.engine.personaplex.model.weights import CONFIG_NAME, find_checkpoint
from app.engine.personaplex.sizes import footprint, lm_bytes
from app.engine.personaplex.tick import Said, Tick
from app.engine.personaplex.timing import Spread, time_ticks
from tests.engine.tiny import lm_shapes, make_tiny_checkpoint, tiny_configs

ROOT = Path(__file__).resolve().parents[3]
CPU, META = torch.device("cpu"), torch.device("meta")

ALONE = """
import builtins, runpy, sys

allowed = {"app", "torch", "numpy", "safetensors", "sentencepiece", *sys.stdlib_module_names}
plain = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").partition(".")[0] in ("app", "__main__") and level == 0:
        top, *rest = name.split(".")
        if top not in allowed or (top == "app" and rest[:1] not in ([], ["engine"])):
            raise ImportError(f"{globals['__name__']} brings {name}")
    return plain(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
sys.argv = ["bench", *sys.argv[1:]]
runpy.run_module("app.engine.personaplex.bench", run_name="__main__")
"""


def quiet(what: str, done: int, of: int) -> None:
    assert 0 <= done < of


def test_every_number_of_calls_is_measured_at_every_context_and_told_in_both_forms(tiny: Path) -> None:
    options = Options((1, 3), (5, 3000), "bf16", "int8", 4, tiny, "cpu")
    report = run(options, quiet)

    assert [(point.calls, point.context) for point in report.points] == [(1, 5), (3, 5), (1, 3000), (3, 3000)]
    for point in report.points:
        assert point.ticks is not None
        assert point.floor is not None
        assert 0 < point.floor.ms < point.ticks.p50_ms <= point.ticks.p99_ms <= point.ticks.max_ms
        assert point.memory_bytes
    assert report.start is not None
    assert report.start.calls == 3
    assert isinstance(report.loading, ColdStart)
    kept = json.loads(as_json(report))
    assert [point["ticks"]["p50_ms"] for point in kept["points"]] == [
        point.ticks.p50_ms for point in report.points if point.ticks is not None
    ]
    assert kept["environment"]["torch"] == torch.__version__
    assert kept["options"]["kv"] == "int8"
    assert kept["loading"]["seconds"] == report.loading.seconds
    assert len([line for line in as_lines(report) if line.startswith("| ")]) == 5


def test_alone_it_imports_nothing_but_torch_and_three_small_packages(tiny: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(tiny), "--calls", "1", "--context", "4", "--frames", "2", "--device", "cpu"]
    words += ["--kv", "bf16", "--json", str(tmp_path / "found.json")]
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )

    assert ran.returncode == 0, ran.stderr
    assert "| 1 | 4 |" in ran.stdout
    assert "9/9" not in ran.stderr
    assert "6/6 the start of a call" in ran.stderr
    assert json.loads((tmp_path / "found.json").read_text())["points"][0]["calls"] == 1


def test_calls_that_do_not_fit_are_said_not_to_and_never_tried(tiny: Path) -> None:
    options = Options((1, 10**9), (5,), "bf16", "bf16", 2, tiny, "cpu")
    report = run(options, quiet)

    assert [point.ticks is None for point in report.points] == [False, True]
    assert "| 1000000000 | 5 | does not fit | | | | | |" in as_lines(report)
    assert report.most_calls() == {5: 1} or report.points[0].ticks.p99_ms >= 60  # type: ignore[union-attr]


def test_a_model_that_has_no_room_is_not_made(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    sizes = json.loads((tiny / CONFIG_NAME).read_text()) | {"num_layers": 10**9}
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CONFIG_NAME).write_text(json.dumps(sizes))
    report = run(Options((1, 8), (750,), checkpoint=tmp_path, device="cpu"), quiet)

    assert report.fitting == 0
    assert all(point.ticks is None for point in report.points)
    assert report.most_calls() == {750: None}
    assert report.loading == "no number of calls fits"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calls", "1,two"], "--calls: found '1,two'; numbers such as 1,8,16 are right"),
        (["--calls", "0"], "--calls: found 0; 1 or more is right"),
        (["--frames", "0"], "--frames: found 0; 1 or more is right"),
        (["--checkpoint", "/nowhere"], "/nowhere: no such folder"),
        (["--memory", "16", "--device", "cpu"], "--memory: found the device cpu"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(said)


# --- ticks


class Watched(Tick):
    """Keeps what every tick was given."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.positions: list[list[int]] = []
        self.reaches: list[Reach] = []
        self.state: LmState = given[2]

    def __call__(self, pcm: Pcm, active: NDArray[np.bool_], reach: Reach) -> Said:
        self.positions.append(self.state.position[torch.from_numpy(active)].tolist())
        self.reaches.append(reach)
        return super().__call__(pcm, active, reach)


def watched(tiny: Path, rows: int, kv: Kv = "bf16") -> Watched:
    networks = Networks(find_checkpoint(tiny), CPU, torch.float32, "bf16", kv, rows)
    state = LmState.of(networks.lm.config, rows, CPU, torch.float32, kv)
    return Watched(networks.lm, networks.mimi, state, networks.mimi.state(rows), False)


@pytest.mark.parametrize(("context", "position"), [(1, 0), (7, 6), (38, 37), (39, 78), (40, 79), (3000, 3039)])
def test_every_tick_begins_where_the_new_position_completes_the_context(
    tmp_path: Path, context: int, position: int
) -> None:
    """A ring of 39 slots is full from 39 positions on, and then it has gone round."""
    tick = watched(make_tiny_checkpoint(tmp_path, context=40), 3)
    times_ms = time_ticks(tick, tick.state, 2, context, 6)

    assert len(times_ms) == 6
    assert min(times_ms) > 0
    assert {tuple(of_rows) for of_rows in tick.positions} == {(position, position)}
    assert {reach.longest for reach in tick.reaches} == {position + 1}
    assert tick.state.position.tolist() == [position + 1, position + 1, 0]


def test_rows_that_are_timed_draw_as_a_personas_calls_do_and_others_are_left_alone(tiny: Path) -> None:
    tick = watched(tiny, 3)
    time_ticks(tick, tick.state, 2, 4, 1)
    choice = tick.state.choice

    assert choice.text_top_k.tolist() == [25, 25, 0]
    assert choice.audio_top_k.tolist() == [250, 250, 0]
    assert choice.text_temperature.tolist() == pytest.approx([0.7, 0.7, 0])
    assert choice.audio_temperature.tolist() == pytest.approx([0.8, 0.8, 0])


@pytest.mark.parametrize(("rows", "context"), [(0, 5), (4, 5), (1, 0)])
def test_rows_and_contexts_that_cannot_be_are_refused(tiny: Path, rows: int, context: int) -> None:
    tick = watched(tiny, 3)
    with pytest.raises(ValueError, match="1 to 3"):
        time_ticks(tick, tick.state, rows, context, 1)


def test_the_99th_percentile_is_a_measured_time_that_a_hundredth_at_most_exceeds() -> None:
    random = np.random.default_rng(3)
    for count in (1, 2, 99, 100, 101, 200, 1000):
        times_ms = random.exponential(10, count).tolist()
        spread = Spread.of(times_ms)
        assert spread.p99_ms in times_ms
        assert sum(ms > spread.p99_ms for ms in times_ms) <= count / 100
        assert spread.max_ms == max(times_ms)
        assert spread.p50_ms == pytest.approx(np.median(times_ms))


# --- roofline


def read_once(c: LmConfig) -> int:
    """Numbers in the matrices and norms of a step, counted from the published shapes: tables give one row each."""
    used = 0
    for key, shape in lm_shapes(c).items():
        parts = key.split(".")
        step = int(parts[1]) if parts[0] in ("depformer_in", "linears") else 0
        step = int(parts[4]) if parts[0] == "depformer" and parts[3] == "gating" else step
        if "emb" in key or step >= CODEBOOKS:
            continue
        share = CODEBOOKS / c.dep_q if key.startswith("depformer.") and "self_attn" in key else 1
        used += round(prod(shape) * share)
    return used


@pytest.mark.parametrize(
    ("kv", "position_bytes"), [("bf16", 4 * 2**17), ("int8", 2 * 2**17 + 8 * 2**10), ("fp8", 270336)]
)
def test_the_bytes_of_a_tick_are_the_weights_once_and_each_calls_keys_and_values(kv: Kv, position_bytes: int) -> None:
    """NVIDIA's model: 512 KiB a position in bfloat16, 264 KiB with a scale for each token and head."""
    lm, mimi = Lm(LmConfig(), META, torch.bfloat16), Mimi(MimiConfig(), META)
    ring = Ring.of(lm.config, 1, 1, META, kv_dtype(kv, torch.bfloat16))
    codec = mimi.entries()
    codec_bytes = sum(entry.into.nbytes for entry in codec.values() if entry.into is not None)
    found = work(lm.config, mimi.config, lm.entries(), codec, ring)

    assert found.position_bytes == position_bytes
    assert found.multiplied == read_once(lm.config)
    assert found.weights_bytes == 2 * read_once(lm.config) + codec_bytes
    codec_ring = 2 * 8 * 2 * 249 * 512 * 4
    assert found.bytes(3, 2998) == found.weights_bytes + 3 * (2998 * position_bytes + codec_ring)
    assert found.bytes(3, 9000) == found.bytes(3, 2999)
    assert found.bytes(1, 10) == found.weights_bytes + 10 * position_bytes + codec_ring * 20 // 249


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8", "int4"])
def test_the_bytes_of_a_tick_are_those_that_are_stored_without_the_tables(weights: Weights) -> None:
    lm, mimi = Lm(LmConfig(), META, torch.bfloat16, weights), Mimi(MimiConfig(), META)
    ring = Ring.of(lm.config, 1, 1, META, torch.bfloat16)
    found = work(lm.config, mimi.config, lm.entries(), {}, ring)
    tables = (16 * 2049 + 32_001) * 4096 + (32_001 + 7 * 2049) * 1024

    assert found.weights_bytes == lm_bytes(lm.config, 2, weights) - 2 * tables
    assert found.multiplied == read_once(lm.config)


def test_the_roofline_is_the_larger_of_bytes_and_multiplications(tiny: Path) -> None:
    found = Networks(find_checkpoint(tiny), CPU, torch.float32, "bf16", "bf16", 1).work
    lm, _ = tiny_configs()
    slow_memory, slow_processor = Limits(1e6, 1e18), Limits(1e18, 1e6)
    flops = 5 * (2 * read_once(lm) + 4 * 2 * 64 * 100)

    assert found.floor(slow_memory, 5, 100).bound == "memory"
    assert found.floor(slow_memory, 5, 100).ms == pytest.approx(found.bytes(5, 100) / 1e3)
    assert found.floor(slow_processor, 5, 100).bound == "compute"
    assert found.floor(slow_processor, 5, 100).ms == pytest.approx(flops / 1e3)


# --- what is measured with


@pytest.mark.parametrize("kv", ["bf16", "int8", "fp8"])
def test_a_ring_made_for_measuring_holds_bounded_values_in_every_slot(kv: Kv) -> None:
    lm, _ = tiny_configs(context=40)
    ring = Ring.of(lm, 2, lm.ring, CPU, kv_dtype(kv, torch.float32))
    fill_ring(ring)
    values = ring.layer(1).read(lm.ring, torch.float32)

    assert float(values.abs().max()) <= 1
    assert float((values == 0).float().mean()) < 0.05
    assert not values[0].equal(values[1])


def test_a_call_that_starts_has_its_prompt_and_a_frame_and_the_others_are_as_long_as_was_asked(tiny: Path) -> None:
    networks = Networks(find_checkpoint(tiny), CPU, torch.float32, "bf16", "int8", 3)
    trial = Trial(networks, 3, graphs=False)
    times_ms = trial.time_starts(2, 400)

    assert min(times_ms) > 0
    assert trial._lm_state.position.tolist() == [401, 251, 0]
    assert trial.row_bytes == pytest.approx(footprint(*tiny_configs(), 4, "bf16", "int8").row_bytes, rel=0.02)
    trial.time_starts(3, 7)
    assert trial._lm_state.position.tolist() == [251, 251, 251]


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8", "int4"])
def test_random_weights_of_every_kind_say_something_finite(weights: Weights) -> None:
    lm_config, mimi_config = tiny_configs(context=40)
    lm, mimi = Lm(lm_config, CPU, torch.float32, weights), Mimi(mimi_config, CPU)
    for entries in (lm.entries(), mimi.entries()):
        fill_weights(entries, CPU, torch.float32)
    lm.pack(2)
    mimi.pack()
    state = LmState.of(lm_config, 2, CPU, torch.float32)
    tick = Tick(lm, mimi, state, mimi.state(2), False)
    time_ticks(tick, state, 2, 60, 3)
    pcm, _, _ = tick(np.zeros((2, 1920), np.float32), np.ones(2, np.bool_), Reach(41, 25, 96))
    kept = state.kv.values

    assert np.isfinite(pcm).all()
    assert bool(kept.isfinite().all())
    assert 0 < float(kept.abs().max()) < 1e3


def test_loading_is_timed_from_the_start_of_a_process_and_its_memory_watched(tiny: Path) -> None:
    found = cold_start(Load(str(tiny), 2, "cpu", "float32", "bf16", "int8", True, None))

    assert found.seconds > 0
    assert found.host_bytes is None or found.host_bytes > 2**20
    with pytest.raises(EngineFault, match=r"nowhere.*no such folder"):
        cold_start(Load("/nowhere", 2, "cpu", "float32", "bf16", "int8", True, None))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it")
def test_memory_of_files_is_not_counted_as_the_processs_own(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(64 * 2**20))
    before = anonymous_bytes("self")
    mapped = np.memmap(file, np.uint8, "r")
    assert int(mapped.sum()) == 0
    between = anonymous_bytes("self")
    own = np.ones(64 * 2**20, np.uint8)
    after = anonymous_bytes("self")

    assert before is not None
    assert between is not None
    assert after is not None
    assert between - before < 16 * 2**20
    assert after - between > 48 * 2**20
    assert len(own)
    assert anonymous_bytes(2**22 + 1) is None


# --- what is told


def report(points: tuple[Point, ...], loading: ColdStart | str = "it needs --checkpoint") -> Report:
    made_on = {"device": "A GPU", "torch": "2", "date": "2026-01-01"}
    given = {"weights": "bf16", "kv": "int8", "calls": "(1, 2)"}
    return Report(made_on, given, Limits(3e12, 7e14), 15 * 10**9, 8 * 10**8, 75, points, None, loading)


def point(calls: int, context: int, p99_ms: float) -> Point:
    return Point(calls, context, Spread(p99_ms / 2, p99_ms, p99_ms + 1), Floor(p99_ms / 4, "memory"), 10**10)


def test_the_most_calls_are_the_largest_measured_number_whose_99th_percentile_is_under_60_ms() -> None:
    found = report((point(1, 750, 9), point(8, 750, 59.99), point(16, 750, 60), point(1, 3000, 61), Point(8, 3000)))

    assert found.most_calls() == {750: 8, 3000: None}
    lines = as_lines(found)
    assert "| 8 | 750 | 30.0 ms | 60.0 ms | 61.0 ms | 15.0 ms (memory) | 2.00 | 10.00 GB |" in lines
    assert "- most measured calls of 3000 positions with a p99 under 60 ms: none" in lines


def test_what_was_not_measured_is_said_and_how_it_can_be() -> None:
    text = "\n".join(as_lines(report((Point(1, 750),))))

    assert "to ready: not measured, it needs --checkpoint" in text
    assert "start of a call: not measured" in text
    assert "75 (weights 15.00 GB, each call 0.80 GB" in text
    loaded = "\n".join(as_lines(report((), ColdStart(41.25, 2_500_000_000))))
    assert "to ready: 41.2 s, host memory beyond the page cache 2.50 GB" in loaded
