"""The speech engine, sealed: it imports nothing else of ours, no asyncio and no settings.

One contract for every engine: for each 80 ms frame heard, one 80 ms frame spoken and the text that goes with it.
"""

from app.engine.contract import (
    FRAME_MS,
    FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    EngineFault,
    EngineFull,
    Heard,
    Role,
    Runner,
    Spoken,
)
from app.engine.engine import Engine, SpeechEngine
from app.engine.process import EngineProcess
from app.engine.slots import Lease

__all__ = [
    "FRAME_MS",
    "FRAME_SAMPLES",
    "SAMPLE_RATE_HZ",
    "Engine",
    "EngineFault",
    "EngineFull",
    "EngineProcess",
    "Heard",
    "Lease",
    "Role",
    "Runner",
    "SpeechEngine",
    "Spoken",
]
