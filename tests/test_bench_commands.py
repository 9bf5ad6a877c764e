"""`personaline bench engine` and `bench quality` as a user runs them, and the picture that the first one draws."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from app.bench_plot import Line, lines_of, plot, require_matplotlib
from app.engine import EngineFault
from app.engine.personaplex.bench.report import Point, Report
from app.engine.personaplex.bench.roofline import Floor, Limits
from app.engine.personaplex.timing import Spread
from app.settings import Settings
from tests.speech import speech, write

ROOT = Path(__file__).resolve().parent.parent


def personaline(folder: Path, *words: str) -> tuple[int, str, str]:
    ours = {name.upper() for name in Settings.model_fields}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    environment = kept | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "bench", *words], env=environment, cwd=folder, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def point(calls: int, context: int, ms: float) -> Point:
    return Point(calls, context, Spread(ms, 1.5 * ms, 2 * ms), Floor(ms / 2, "memory"), 10**9)


def report(*points: Point) -> Report:
    made_on = {"device": "A GPU", "date": "2026-01-01"}
    return Report(made_on, {"weights": "bf16", "kv": "int8"}, Limits(3e12, 7e14), 1, 1, 8, points, None, "")


def png_size(file: Path) -> tuple[int, int]:
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_bench_engine_prints_its_table_and_writes_the_figures_and_the_picture(tiny: Path, tmp_path: Path) -> None:
    words = ["engine", "--checkpoint", str(tiny), "--calls", "1,2", "--context", "6,3000", "--frames", "3"]
    code, out, err = personaline(
        tmp_path, *words, "--device", "cpu", "--kv", "bf16", "--json", "found.json", "--plot", "found.png"
    )

    assert code == 0, err
    assert out.startswith("| calls | positions | p50 | p99 | max | roofline |")
    assert out.count(" ms (memory) |") + out.count(" ms (compute) |") == 4
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(one["calls"], one["context"]) for one in found["points"]] == [(1, 6), (2, 6), (1, 3000), (2, 3000)]
    assert png_size(tmp_path / "found.png") == (1350, 810)


def test_bench_quality_prints_a_row_for_each_measure_of_each_kind(tiny: Path, tmp_path: Path) -> None:
    write(tmp_path / "caller.wav", speech(16_000, 0.7), 16_000)
    words = ["--checkpoint", str(tiny), "--frames", "8", "--weights", "int8", "--kv", "int8", "--wav", "caller.wav"]
    code, out, err = personaline(tmp_path, "quality", *words, "--persona", "guide", "--json", "found.json")

    assert code == 0, err
    kinds = [(line.split("|")[1].strip(), line.split("|")[2].strip()) for line in out.splitlines() if "cosine" in line]
    assert kinds == [("bf16", "int8"), ("int8", "bf16"), ("int8", "int8")]
    assert "8 frames, persona guide, heard caller.wav" in out
    assert json.loads((tmp_path / "found.json").read_text())["heard"] == "caller.wav"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["engine", "--calls", "many"], "--calls: found 'many'; numbers such as 1,8,16 are right"),
        (["quality", "--weights", "int3"], "--weights: found 'int3'; some of bf16, int8, fp8, int4 are right"),
        (["quality", "--persona", "nobody"], "--persona: found 'nobody'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tiny: Path, tmp_path: Path, words: list[str], said: str) -> None:
    code, _, errors = personaline(tmp_path, *words, "--checkpoint", str(tiny))

    assert code == 2
    assert f"personaline: {said}" in errors
    assert "Traceback" not in errors


# --- the picture


def test_each_context_is_a_line_of_its_measured_calls_in_rising_order() -> None:
    found = lines_of(report(point(8, 750, 10), point(1, 750, 5), Point(16, 750), Point(1, 3000), point(8, 1500, 12)))

    assert found == [Line(750, (1, 8), (5, 10), (7.5, 15)), Line(1500, (8,), (12,), (18,))]


def test_a_picture_is_drawn_of_any_measured_numbers(tmp_path: Path) -> None:
    many = [point(calls, context, calls * context / 400) for calls in (1, 8, 128) for context in range(100, 1000, 100)]
    for index, points in enumerate(([point(1, 750, 5)], many)):
        plot(report(*points), tmp_path / f"{index}.png")
        assert png_size(tmp_path / f"{index}.png") == (1350, 810)


def test_a_picture_that_cannot_be_drawn_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineFault, match="nothing to plot"):
        plot(report(Point(1, 750)), tmp_path / "none.png")
    with pytest.raises(EngineFault, match="cannot be written"):
        plot(report(point(1, 750, 5)), tmp_path / "nowhere" / "found.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EngineFault, match=r"pip install 'personaline\[bench\]'"):
        require_matplotlib()
