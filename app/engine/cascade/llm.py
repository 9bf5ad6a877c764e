"""The small language model: a GGUF file run by llama.cpp inside the process, one slot a row."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xllamacpp

from app.engine.contract import EngineFault

Message = dict[str, str]

_CONTEXT_TOKENS = 4096
_CACHE_MIB = 1024
_LONGEST_REPLY_TOKENS = 128
_NICE = 5


def _step_back() -> None:
    """Let the recogniser and the beat go before the model's threads, which inherit this one's priority on Linux."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class LanguageModel:
    """Thread-safe. Each row's prompt stays in memory, so only what is new of a conversation is read again."""

    def __init__(self, path: Path, rows: int) -> None:
        """Raises EngineFault when the file cannot be opened as a model."""
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = _CONTEXT_TOKENS * rows
        params.n_parallel = rows
        params.kv_unified = False
        params.cache_ram_mib = _CACHE_MIB
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = min(4, os.cpu_count() or 1)
        params.verbosity = -1
        params.ui = False
        try:
            with ThreadPoolExecutor(1, initializer=_step_back) as starter:
                self._server: Any = starter.submit(xllamacpp.Server, params).result()
        except RuntimeError as error:
            raise EngineFault(f"language model: {path}: {error}; a GGUF chat model is right (CASCADE_LLM)") from error

    def read(self, row: int, messages: Sequence[Message]) -> None:
        """Take these messages into the row's memory, so that the reply to the next one starts sooner. Blocks."""
        self._complete(row, messages, 0, lambda text: False)

    def reply(self, row: int, messages: Sequence[Message], on_text: Callable[[str], bool]) -> None:
        """Say what comes next, piece by piece, to `on_text`, which answers True to stop. Blocks until the end."""
        self._complete(row, messages, _LONGEST_REPLY_TOKENS, on_text)

    def _complete(self, row: int, messages: Sequence[Message], max_tokens: int, on_text: Callable[[str], bool]) -> None:
        request = {
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "cache_prompt": True,
            "id_slot": row,
            "stop": ["\n"],
        }
        errors: list[str] = []

        def on_chunk(chunk: Any) -> bool:
            if "error" in chunk:
                errors.append(str(chunk["error"].get("message", chunk["error"])))
                return True
            choices = chunk.get("choices") or [{}]
            return on_text(choices[0].get("delta", {}).get("content") or "")

        self._server.handle_chat_completions(request, on_chunk)
        if errors:
            raise RuntimeError(f"language model, row {row}: {errors[0]}")

    def close(self) -> None:
        del self._server
