"""What this machine has for PersonaPlex: packages, a device, memory. torch is imported by what needs it, not before."""

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.engine import EngineFault

Kind = Literal["cuda", "mps", "cpu"]

INSTALL = "pip install 'personaline[personaplex]'"
CPU_MOST_BYTES = 10**9
"""Of weights, for calls on a CPU: each 80 ms reads all of them, and its memory gives some 10 to 20 GB a second."""

FP8_CAPABILITY = (8, 9)
"""From Ada on. Source: CUDA C++ Programming Guide, "Compute Capabilities"."""

_PACKAGES = ("torch", "safetensors", "sentencepiece", "pyloudnorm")


@dataclass(frozen=True, slots=True)
class Device:
    """Where the model can run. `free_bytes` is what was free when it was asked.

    `capability` is NVIDIA's number for what a GPU can do; (0, 0) for other devices.
    """

    kind: Kind
    name: str
    free_bytes: int
    capability: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return f"{self.name}, {self.free_bytes / 1e9:.1f} GB free"


def require_installed() -> None:
    """As `require_packages`, without importing one of them."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineFault(f"PersonaPlex needs {', '.join(missing)}: {INSTALL}")


def require_packages() -> None:
    """Raises EngineFault that names what is not installed, and the remedy."""
    require_installed()
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise EngineFault(f"torch cannot be loaded ({error}): install the build for this machine, {INSTALL}") from error


def may_be_gpu(wanted: str) -> bool:
    """Whether looking for the device asked for may find a GPU, as far as is known without importing torch."""
    try:
        return wanted != "cpu" and not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return wanted != "cpu"


def find_device(wanted: str, weights_bytes: int) -> Device:
    """The device asked for; with "auto" the best that can carry a call: an NVIDIA GPU, Apple's, or the CPU.

    "auto" takes the CPU for small models only. Needs torch; makes a context on an NVIDIA GPU.

    Raises:
        EngineFault: there is none such. The message says why and what would do.
    """
    import torch

    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        require_compiler()
        try:
            free_bytes = torch.cuda.mem_get_info()[0]
            return Device("cuda", torch.cuda.get_device_name(), free_bytes, torch.cuda.get_device_capability())
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise EngineFault(f"the GPU cannot be used ({reason}): see with nvidia-smi who holds it") from error
    if wanted in ("auto", "mps") and torch.backends.mps.is_available():
        free_bytes = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return Device("mps", "Apple GPU", free_bytes)
    if wanted == "cpu" or (wanted == "auto" and weights_bytes <= CPU_MOST_BYTES):
        return Device("cpu", "CPU", _free_ram_bytes())
    raise EngineFault(_no_device(wanted))


def require_compiler() -> None:
    """Raises EngineFault where Triton, which compiles the kernels for the GPU, has no C compiler for its own part.

    Source: triton/runtime/build.py.
    """
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if importlib.util.find_spec("triton") is not None and not found:
        raise EngineFault("the kernels for the GPU need a C compiler (gcc): apt-get install gcc libc6-dev")


def dtype_for(wanted: str, kind: Kind) -> str:
    """The precision asked for; with "auto" that of the weights, bfloat16, and float32 on a CPU.

    float16 has a smaller range than the weights were trained in, so nothing chooses it by itself, not on Apple's GPUs
    either; a CPU is slower in bfloat16 than in float32.
    """
    if wanted != "auto":
        return wanted
    return "float32" if kind == "cpu" else "bfloat16"


def require_kinds(device: Device, weights: str, kv: str) -> None:
    """Raises EngineFault for weights or keys that this device cannot read."""
    if "fp8" not in (weights, kv) or device.kind == "cpu" or device.capability >= FP8_CAPABILITY:
        return
    needs = f"an NVIDIA GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more"
    found = (
        f"{device.name} with {device.capability[0]}.{device.capability[1]}" if any(device.capability) else device.name
    )
    raise EngineFault(f"fp8 needs {needs}, and there is {found}: int8 is right here")


def _no_device(wanted: str) -> str:
    import torch

    sought = {"cuda": "NVIDIA GPU", "mps": "Apple GPU"}.get(wanted, "GPU")
    has_nvidia = wanted != "mps" and Path("/dev/nvidiactl").exists()
    if has_nvidia and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA: install the build that pytorch.org names"
    if has_nvidia:
        return f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}, and finds none: update it"
    others = "ENGINE=cascade answers calls without; PERSONAPLEX_DEVICE=cpu is for recordings, far slower than speech"
    return f"there is no {sought} here, and PersonaPlex needs one: {others}"


def _free_ram_bytes() -> int:
    """What programs can still have: Linux counts what it would give back; elsewhere half of all there is."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
