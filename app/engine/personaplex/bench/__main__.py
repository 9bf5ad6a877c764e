"""python -m app.engine.personaplex.bench: what PersonaPlex costs on this machine.

It needs torch, numpy, safetensors and sentencepiece alone; `personaline bench engine` is the same with a plot.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from app.engine.contract import EngineFault
from app.engine.personaplex.bench.report import as_json, as_lines
from app.engine.personaplex.bench.run import Device, Options, numbers, run, write
from app.engine.personaplex.model.quantize import Weights
from app.engine.personaplex.model.ring import Kv

_USERS_FAULT = 2


def _options(words: Sequence[str] | None) -> tuple[Options, Path | None]:
    usual = Options()
    parser = argparse.ArgumentParser(
        prog="python -m app.engine.personaplex.bench", description="What PersonaPlex costs on this machine."
    )
    parser.add_argument("--calls", default=",".join(map(str, usual.calls)), help="how many at once, in turn")
    parser.add_argument("--context", default=",".join(map(str, usual.contexts)), help="positions of each, in turn")
    parser.add_argument("--weights", default=usual.weights, choices=get_args(Weights))
    parser.add_argument("--kv", default=usual.kv, choices=get_args(Kv), help="how keys and values are kept")
    parser.add_argument("--frames", default=usual.frames, type=int, help="ticks to measure of each")
    parser.add_argument("--checkpoint", type=Path, help="a folder; random weights of the real size otherwise")
    parser.add_argument("--device", default=usual.device, choices=get_args(Device))
    parser.add_argument("--no-graphs", action="store_true", help="start every operation by itself")
    parser.add_argument("--memory", type=float, metavar="GB", help="let it have no more of the GPU than this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(words)
    options = Options(
        numbers("--calls", given.calls), numbers("--context", given.context), given.weights, given.kv, given.frames,
        given.checkpoint, given.device, not given.no_graphs, given.memory,
    )  # fmt: skip
    return options, given.json


def main(words: Sequence[str] | None = None) -> int:
    """The exit code: 2 where something has to be put right first."""

    def progress(what: str, done: int, of: int) -> None:
        sys.stderr.write(f"{done + 1}/{of} {what}\n")

    try:
        options, json_file = _options(words)
        report = run(options, progress)
        if json_file is not None:
            write(json_file, as_json(report))
    except EngineFault as fault:
        sys.stderr.write(f"{fault}\n")
        return _USERS_FAULT
    sys.stdout.write("\n".join(as_lines(report)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
