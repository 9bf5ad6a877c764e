"""The comparison runs, on a model small enough for a test, and its table says what was measured."""

import sys
from dataclasses import replace

import pytest

from app.bench_moshi import MODEL, ROWS, Beside, EngineCost, bench_moshi, table

SMALL = replace(
    MODEL, dim=32, num_heads=2, num_layers=1, context=40, text_card=300, card=2048, depformer_dim=16,
    depformer_num_heads=2, depformer_num_layers=1, depformer_dim_feedforward=66,
)  # fmt: skip


def test_both_packages_step_the_same_model_and_every_number_of_rows_is_measured() -> None:
    pytest.importorskip("moshi", reason="the witness is not installed: pip install --no-deps moshi==0.2.13")

    cost = bench_moshi(lambda text: None, SMALL)

    assert all(one.ours_ms > 0 and (one.theirs_ms or 0) > 0 for one in cost.beside)
    assert len(cost.step_ms) == len(ROWS)
    assert "1 layers of width 32" in "\n".join(table(cost))


def test_without_moshi_the_own_figures_are_there_and_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "moshi.models.lm", None)

    cost = bench_moshi(lambda text: None, SMALL)

    assert [one.theirs_ms for one in cost.beside] == [None, None]
    assert "pip install --no-deps moshi==0.2.13" in table(cost)[-1]


def test_the_table_gives_each_package_its_time_their_ratio_and_the_cost_of_a_row() -> None:
    beside = (Beside("one row", 50.04, 100.0), Beside("a full window", 60.0, None))
    lines = table(EngineCost(MODEL, beside, (48.0, 60.0, 80.0, 100.0), 2, ("It was busy.",)))

    assert "| one row | 50.0 ms | 100.0 ms | 0.50 |" in lines
    assert "| a full window | 60.0 ms | - | - |" in lines
    assert "| 8 | 100.0 ms | 12.5 ms |" in lines
    assert lines[-1] == "It was busy."
