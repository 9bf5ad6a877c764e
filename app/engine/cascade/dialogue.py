"""One row's conversation: when to think, when to speak, when to stop, and what was said on both sides."""

from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from app.engine.cascade.ears import Ears
from app.engine.cascade.llm import Message
from app.engine.cascade.mind import Answer, Mind
from app.engine.cascade.mouth import Mouth
from app.engine.cascade.prompt import greeted, opening
from app.engine.cascade.words import endpoint_ms, is_backchannel, is_hum, takes_the_turn, words_of
from app.engine.contract import FRAME_MS, Heard, Pcm, Role, Spoken

_EARLY_MS = 112
"""Silence after which the reply is prepared, to be dropped if the caller goes on."""
_SHORTEST_MS = 150
"""Less speech than this is not worth the recogniser's guess."""
_OVERLAP_ENDS_MS = 480
_JUST_BEFORE_MS = 96
"""A guess must be quick: with less silence before it, the recogniser takes half the time."""
_PARTIAL_EVERY_MS = 1_040
_OPENING_MS = 800
_OPENING_WAIT_S = 0.055
"""In the first words spoken over the agent, the one place where the beat waits: the agent stops a frame sooner."""
_KEPT_MESSAGES = 40
_NEXT: Message = {"role": "user", "content": ""}
"""Read ahead of the caller's words: what any chat format puts before them need not be read again with them."""


@dataclass(slots=True)
class _Utterance:
    """What the agent says in one piece: a reply, or the guided words `guided`."""

    source: Answer
    guided: str = ""
    start_within_ms: int | None = None
    waited_ms: int = 0


class Dialogue:
    """Engine thread only."""

    def __init__(self, row: int, role: Role, mind: Mind, vad: Path | None = None) -> None:
        self._row = row
        self._mind = mind
        self._ears = Ears(vad)
        self._mouth = Mouth()
        self._opening = opening(role)
        self._history: list[Message] = list(self._opening)
        self._answer: Answer | None = None
        self._saying: _Utterance | None = None
        self._next: deque[_Utterance] = deque()
        self._over_caller = False
        self._before = ""
        self._began_ms: int | None = None
        self._last_began_ms: int | None = None
        self._partial: Future[str] | None = None
        self._partial_ms = 0
        self._partials: list[str] = []
        self._utterance = 0
        self._heard: list[Heard] = []
        self._mind.read(row, greeted(role))
        if role.greeting:
            self.say(role.greeting, None)

    def say(self, text: str, start_within_ms: int | None) -> None:
        """Words to be said exactly, before the reply to a caller who has the turn.

        With a time they begin at the latest after so many ms of the agent's silence, over the caller if need be.
        """
        self._next.append(_Utterance(self._mind.say(text), text, start_within_ms))

    def change(self, role: Role) -> None:
        """Another role replies from now on, and greets. What is being said, or on its way, is still the old one's."""
        self._drop_answer()
        words = self._history[len(self._opening) :]
        self._opening = opening(role)
        self._history = [*self._opening, *words]
        self._mind.read(self._row, [*self._history, _NEXT])
        if role.greeting:
            self.say(role.greeting, None)

    def frame(self, pcm: Pcm) -> Spoken:
        """Hear one frame, say one."""
        self._ears.hear(pcm)
        self._heard.clear()
        stopped = None
        if self._mouth.busy and not self._over_caller:
            stopped = self._overlap()
        else:
            self._turn()
        if stopped is not None:
            self._remember(f"{self._mouth.said.strip()} ...")
            return Spoken(stopped, "", ends=True, interrupted=True, heard=tuple(self._heard))
        self._begin()
        speech, text, ends = self._mouth.next()
        said = self._end() if ends else ""
        return Spoken(speech, text, ends, heard=tuple(self._heard), said=said)

    def close(self) -> None:
        self._drop_answer()
        self._drop_reply()

    def _begin(self) -> None:
        """Say what is next, once the agent has the turn or can wait for it no longer."""
        if self._mouth.busy or not self._next:
            return
        first = self._next[0]
        callers_turn = self._ears.has_speech and self._reply is None
        if callers_turn:
            if first.start_within_ms is None or first.waited_ms < first.start_within_ms:
                first.waited_ms += FRAME_MS
                return
            self._over_caller = True
        self._saying = self._next.popleft()
        self._mouth.play(self._saying.source)

    def _end(self) -> str:
        """An utterance is over: the guided words if these were the ones, and nothing else in their place."""
        assert self._saying is not None
        guided, said = self._saying.guided, self._mouth.said
        self._saying, self._over_caller = None, False
        self._remember(said.strip())
        self._begin()
        return guided if said.split() == guided.split() else ""

    def _turn(self) -> None:
        """The agent is silent: wait for the caller's words and for the end of them."""
        ears = self._ears
        if not ears.has_speech:
            return
        if ears.silence_ms < _EARLY_MS:
            self._drop_answer()
            self._show_partial()
            return
        if self._answer is None:
            self._answer = self._mind.answer(self._row, self._history_to_come(), self._before, ears.utterance())
        text = self._answer.text
        if text is not None and ears.silence_ms >= endpoint_ms(text):
            self._commit(self._answer, text)

    def _history_to_come(self) -> list[Message]:
        """With the guided words that will be said before the reply, so that it does not contradict them."""
        history = list(self._history)
        for utterance in self._to_come:
            history = _with(history, utterance.guided)
        return history

    def _commit(self, answer: Answer, text: str) -> None:
        """The caller has finished: what was prepared becomes the reply."""
        hummed = self._hummed()
        if words_of(text):
            self._hear("Mm-hmm." if hummed else text, final=True)
        if not words_of(text) or ((hummed or is_backchannel(text)) and not self._asked()):
            self._drop_answer()
        else:
            self._history.append({"role": "user", "content": text})
            self._next.append(_Utterance(answer))
            self._answer = None
        self._listen_anew()

    def _overlap(self) -> Pcm | None:
        """The agent has the turn. The last frame of its speech if the caller takes it, else None."""
        ears = self._ears
        if not ears.has_speech:
            return None
        if not self._mouth.started and self._reply is not None and self._history[-1]["role"] == "user":
            self._take_back()
            return None
        text = self._next_partial(0)
        if text is None and self._partial is not None and ears.speech_ms < _OPENING_MS:
            wait([self._partial], _OPENING_WAIT_S)
            text = self._collect()
        if text is None:
            return None
        self._partials.append(text)
        if ears.silence_ms >= _OVERLAP_ENDS_MS:
            return self._overlap_ended(text)
        return self._stop() if takes_the_turn(self._partials, ears.speech_ms) and not self._hummed() else None

    def _overlap_ended(self, text: str) -> Pcm | None:
        """Said and done while the agent spoke: words are answered, a backchannel is only noted."""
        if words_of(text) and not is_backchannel(text) and not self._hummed():
            return self._stop()
        if words_of(text):
            self._hear("Mm-hmm." if self._hummed() else text, final=True)
        self._listen_anew()
        return None

    def _hummed(self) -> bool:
        return is_hum(self._ears.utterance())

    def _stop(self) -> Pcm | None:
        """Fall silent: the last frame, None when nothing was heard yet; guided words then wait for another chance."""
        assert self._saying is not None
        self._drop_reply()
        self._partials.clear()
        started, last = self._mouth.started, self._mouth.stop()
        if self._saying.guided and not started:
            self._next.appendleft(self._saying)
        self._saying = None
        return last if started else None

    def _take_back(self) -> None:
        """The caller went on before the reply was audible: their next words join the ones that were answered."""
        self._before = self._history.pop()["content"]
        self._began_ms = self._last_began_ms
        self._utterance -= 1
        self._stop()

    @property
    def _reply(self) -> _Utterance | None:
        """The reply that is being said or is next to be; never more than one."""
        return next((one for one in self._to_come if not one.guided), None)

    @property
    def _to_come(self) -> list[_Utterance]:
        return [*([self._saying] if self._saying else []), *self._next]

    def _drop_reply(self) -> None:
        if (reply := self._reply) is not None:
            reply.source.cancel()
            self._next = deque(one for one in self._next if one is not reply)

    def _drop_answer(self) -> None:
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    def _asked(self) -> bool:
        """Whether the agent's last words want an answer, so that "yes" is one."""
        return self._history[-1]["role"] == "assistant" and self._history[-1]["content"].rstrip().endswith("?")

    def _show_partial(self) -> None:
        if text := self._next_partial(_PARTIAL_EVERY_MS):
            self._hear(f"{self._before} {text}".strip(), final=False)

    def _next_partial(self, every_ms: int) -> str | None:
        """The words so far, when new ones are there; the recogniser is asked again once it is free."""
        text, ears = self._collect(), self._ears
        due = ears.heard_ms >= self._partial_ms + every_ms
        if self._partial is None and due and ears.speech_ms >= _SHORTEST_MS:
            self._partial, self._partial_ms = self._mind.recognise(ears.utterance(_JUST_BEFORE_MS)), ears.heard_ms
        return text

    def _collect(self) -> str | None:
        if self._partial is None or not self._partial.done():
            return None
        text, self._partial = self._partial.result(), None
        return text

    def _hear(self, text: str, final: bool) -> None:
        if self._began_ms is None:
            self._began_ms = self._ears.began_ms or 0
        ended_s = self._ears.ended_ms / 1000
        self._heard.append(Heard(self._utterance, text, self._began_ms / 1000, ended_s, final))
        self._utterance += final

    def _listen_anew(self) -> None:
        self._ears.forget()
        self._over_caller = False
        self._partial = None
        self._partials.clear()
        self._before = ""
        self._last_began_ms, self._began_ms = self._began_ms, None

    def _remember(self, said: str) -> None:
        """Keep the agent's words as they were heard; begin to forget the oldest turns of a very long call."""
        if said and said != "...":
            self._history = _with(self._history, said)
        if len(self._history) - len(self._opening) > _KEPT_MESSAGES:
            self._history[len(self._opening) : -_KEPT_MESSAGES // 2] = []
        self._mind.read(self._row, [*self._history, _NEXT])


def _with(history: list[Message], said: str) -> list[Message]:
    """Add the agent's words; two utterances in a row are one message: some chat formats want turns to alternate."""
    if history[-1]["role"] != "assistant":
        return [*history, {"role": "assistant", "content": said}]
    return [*history[:-1], {"role": "assistant", "content": f"{history[-1]['content']} {said}"}]
