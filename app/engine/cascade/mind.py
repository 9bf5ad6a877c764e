"""The slow parts, off the engine thread: recognising, thinking and synthesising, each cancellable in mid-word."""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from moonshine_voice.errors import MoonshineError

from app.engine.cascade.asr import Recogniser
from app.engine.cascade.llm import LanguageModel, Message
from app.engine.cascade.tts import Speech, Voice
from app.engine.contract import Pcm

_CLAUSE_END = re.compile(r"[.!?](?=\s|$)|[,;:](?=\s)")
_SHORTEST_CLAUSE_WORDS = 4
_SHORTEST_FIRST_LETTERS = 6
_PHRASE_START = re.compile(r"\s(?:and|are|at|because|but|costs?|for|from|in|is|on|or|until|which|with)\s")
_SHORTEST_PHRASE_LETTERS = 11
_ABBREVIATION = re.compile(r"(?:\b[A-Za-z]|\b(?:Mr|Mrs|Ms|Dr|St|Ave|Rd|No|vs|approx))\.$")
_APOLOGY = "I'm sorry, could you say that again?"

_log = logging.getLogger("personaline.engine.cascade")


class Answer:
    """One attempt at a reply, filled by a worker. Dropping it costs nothing: `cancel` and forget."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.speech: deque[Speech] = deque()
        self._cancelled = threading.Event()
        self._finished = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def finished(self) -> bool:
        return self._finished.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    def finish(self) -> None:
        self._finished.set()


class Mind:
    """Recogniser, language model and voice, shared by all rows. Its methods return at once; workers do the work."""

    def __init__(self, recogniser: Recogniser, model: LanguageModel, voice: Voice, rows: int) -> None:
        self._recogniser = recogniser
        self._model = model
        self._voice = voice
        # Apart, so that the recogniser never waits for a thread that is waiting for the model.
        self._listeners = ThreadPoolExecutor(max_workers=rows, thread_name_prefix="recognise")
        self._thinkers = ThreadPoolExecutor(max_workers=4 * rows, thread_name_prefix="think")

    def recognise(self, pcm: Pcm) -> "Future[str]":
        return self._listeners.submit(self._recogniser, pcm)

    def read(self, row: int, messages: Sequence[Message]) -> "Future[None]":
        """Get the row's memory ready for what the caller says next."""
        reading = self._thinkers.submit(self._model.read, row, list(messages))
        reading.add_done_callback(_tell)
        return reading

    def say(self, text: str) -> Answer:
        """Words that are known already."""
        answer = Answer()
        answer.text = ""
        self._start(answer, lambda: answer.speech.append(self._voice(text)))
        return answer

    def answer(self, row: int, history: Sequence[Message], before: str, pcm: Pcm) -> Answer:
        """Recognise `pcm`, put `before` in front of it, and reply to the whole, clause by clause."""
        answer, messages = Answer(), list(history)
        self._start(answer, lambda: self._reply(answer, row, messages, before, pcm))
        return answer

    def _start(self, answer: Answer, work: Callable[[], None]) -> None:
        self._thinkers.submit(self._run, answer, work).add_done_callback(_tell)

    def _run(self, answer: Answer, work: Callable[[], None]) -> None:
        try:
            work()
        except (RuntimeError, MoonshineError, ValueError) as error:
            _log.error("a reply failed, the caller is asked to repeat: %s", error)
            answer.text = answer.text or "..."
            answer.speech.append(self._voice(_APOLOGY))
        finally:
            # Whatever happened, the caller's turn must be able to end.
            answer.text = answer.text or ""
            answer.finish()

    def _reply(self, answer: Answer, row: int, messages: list[Message], before: str, pcm: Pcm) -> None:
        text = f"{before} {self._recogniser(pcm)}".strip()
        answer.text = text
        if not text or answer.cancelled:
            return
        messages.append({"role": "user", "content": text})
        clauses = Clauses()

        def on_text(piece: str) -> bool:
            for clause in clauses.add(piece):
                answer.speech.append(self._voice(clause))
            return answer.cancelled

        self._model.reply(row, messages, on_text)
        if not answer.cancelled and (rest := clauses.rest()):
            answer.speech.append(self._voice(rest))

    def close(self) -> None:
        self._listeners.shutdown(wait=True, cancel_futures=True)
        self._thinkers.shutdown(wait=True, cancel_futures=True)
        self._model.close()
        self._recogniser.close()


def _tell(work: "Future[None]") -> None:
    """A worker's unexpected end is nobody's to wait for, but it must not be lost."""
    if not work.cancelled() and (error := work.exception()) is not None:
        _log.error("a worker of the embedded engine failed", exc_info=error)


class Clauses:
    """Cuts a growing text where a speaker breathes: after a sentence, or after a comma once four words are there.

    The very first clause may be short ("I'm sorry,") or a phrase of eleven letters or more, before "at" or "costs":
    the caller hears the answer begin some 400 ms sooner, and the rest is ready before the phrase is over.
    """

    def __init__(self) -> None:
        self._text = ""
        self._begun = False

    def add(self, piece: str) -> list[str]:
        self._text += piece
        clauses = self._clauses() or ([] if self._begun else self._phrase())
        self._begun = self._begun or bool(clauses)
        return clauses

    def _phrase(self) -> list[str]:
        match = _PHRASE_START.search(self._text)
        while match and match.start() < _SHORTEST_PHRASE_LETTERS:
            match = _PHRASE_START.search(self._text, match.end() - 1)
        if match is None:
            return []
        phrase, self._text = self._text[: match.start()].strip(), self._text[match.start() :]
        return [phrase]

    def _clauses(self) -> list[str]:
        clauses, start = [], 0
        for match in _CLAUSE_END.finditer(self._text):
            clause = self._text[start : match.end()]
            if match.end() == len(self._text) or _ABBREVIATION.search(clause):
                continue
            short = len(clause.split()) < _SHORTEST_CLAUSE_WORDS
            first = not self._begun and len(clause) >= _SHORTEST_FIRST_LETTERS
            if match[0] in ".!?" or first or not short:
                clauses.append(clause.strip())
                start = match.end()
        self._text = self._text[start:]
        return clauses

    def rest(self) -> str:
        return self._text.strip()
