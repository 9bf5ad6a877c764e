"""How much memory there is, how much is used, and a smaller card than the one at hand."""

import os
from pathlib import Path

import torch

from app.engine.contract import EngineFault

_PROC = Path("/proc")


def cap_memory(device: torch.device, most_bytes: float) -> None:
    """Let torch have no more of a GPU than a smaller card has. What the driver keeps for itself comes on top.

    Raises EngineFault for a device that cannot be capped, or has no more than that.
    """
    if device.type != "cuda":
        raise EngineFault(f"--memory: found the device {device.type}; only the memory of an NVIDIA GPU can be capped")
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    if not 0 < most_bytes <= total_bytes:
        raise EngineFault(f"--memory: found {most_bytes / 1e9:g}; this GPU has {total_bytes / 1e9:.1f} GB")
    # Of the current device: this function knows no device without a number.
    torch.cuda.set_per_process_memory_fraction(most_bytes / total_bytes)


def free_bytes(device: torch.device, cap_bytes: float | None) -> int:
    """What a model could have now, nothing of it loaded yet; half of all where the system is not Linux."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free if cap_bytes is None else min(free, int(cap_bytes))
    if not (_PROC / "meminfo").exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = dict(line.split(":", 1) for line in (_PROC / "meminfo").read_text(encoding="ascii").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def give_back(device: torch.device) -> None:
    """Give back what is not in use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def used_bytes(device: torch.device) -> int:
    """What is taken of a GPU now, by everything that runs on it; else the process's own memory, without the pages of
    files.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return anonymous_bytes("self") or 0


def anonymous_bytes(process: int | str) -> int | None:
    """Of a process, without the pages of files that the system may drop. None once it has ended, or is not Linux's."""
    try:
        status = (_PROC / str(process) / "status").read_text(encoding="utf-8")
    except OSError:
        return None
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(sizes[0]) * 1024 if sizes else None
