"""What a caller's words mean for whose turn it is: an interruption, a backchannel, the end of a turn."""

import re
from collections.abc import Sequence

import numpy as np

from app.engine.cascade.ears import RATE_HZ
from app.engine.contract import Pcm

_BACKCHANNELS = {
    "ah", "aha", "alright", "cool", "fine", "good", "got", "great", "hm", "hmm", "huh", "i", "it", "it's", "mama",
    "mhm", "mm", "mmm", "nice", "of", "oh", "ok", "okay", "perfect", "really", "right", "see", "sure", "that's", "the",
    "uh", "uhhuh", "uhuh", "um", "wow", "yeah", "yep", "yes", "you",
}  # fmt: skip
_HUMS = re.compile(r"m+h*|h+m+|m+-?h*m*|u+h+|a+h+|o+h+|mh+|mm-h.*|uh-h.*")
_STOPS_AT_ONCE = {"wait", "stop"}
"""No hum was ever recognised as one of these."""
_STOPS = {
    "no", "sorry", "hold", "hang", "excuse", "actually", "hello", "but", "pardon", "please", "listen",
}  # fmt: skip
_QUESTIONS = {
    "how", "what", "what's", "when", "where", "where's", "who", "why", "which", "can", "could", "do", "does", "is",
    "are", "will", "would",
}  # fmt: skip
_UNFINISHED = {
    "a", "an", "and", "as", "at", "because", "but", "for", "from", "if", "in", "is", "my", "of", "on", "or", "so",
    "than", "that", "the", "to", "uh", "um", "with", "your",
}  # fmt: skip

_HUM_SHARE = 0.02
_HUM_ABOVE_HZ = 1_000


def words_of(text: str) -> list[str]:
    """Lower case, without punctuation; hyphens and apostrophes inside a word stay."""
    return re.findall(r"[a-z0-9$]+(?:[-'][a-z0-9]*)*", text.lower().replace("\u2019", "'"))


def is_backchannel(text: str) -> bool:
    """True for "mm-hmm", "uh-huh", "okay, great": the caller listens and does not want the turn."""
    words = words_of(text)
    return len(words) <= 4 and all(word in _BACKCHANNELS or _HUMS.fullmatch(word) for word in words)


def is_hum(pcm: Pcm) -> bool:
    """True for a sound made with the mouth closed, whatever the recogniser made of it: hardly anything over 1 kHz.

    pcm: float32 [n] at 16 kHz.
    """
    power = np.abs(np.fft.rfft(pcm)) ** 2
    edge = int(_HUM_ABOVE_HZ * len(pcm) / RATE_HZ)
    return bool(power[edge:].sum() < _HUM_SHARE * power.sum())


def takes_the_turn(partials: Sequence[str], speech_ms: int) -> bool:
    """Whether a caller who speaks over the agent means to be heard now, by the last partial transcripts.

    A partial of a quarter of a second is often wrong, so but for "wait" and "stop" its first word must have been
    seen twice. Then one word that means stop is enough, two with a question word, three of any kind; and a second of
    words that are not a backchannel.
    """
    if partials and words_of(partials[-1])[:1] and words_of(partials[-1])[0] in _STOPS_AT_ONCE:
        return True
    if len(partials) < 2:
        return False
    before, now = words_of(partials[-2]), words_of(partials[-1])
    if not before or not now or before[0] != now[0] or is_backchannel(partials[-1]):
        return False
    if now[0] in _STOPS:
        return True
    return len(now) >= (2 if now[0] in _QUESTIONS else 3) or speech_ms >= 1_000


def endpoint_ms(text: str) -> int:
    """How much silence ends the turn after these words: little after a question, more where more is to come."""
    words = words_of(text)
    if not words or words[-1] in _UNFINISHED or text.rstrip()[-1:] in ",-":
        return 1_000
    if text.rstrip().endswith("?") and len(words) > 2:
        return 420
    return 560 if len(words) > 2 else 720
