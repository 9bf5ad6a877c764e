"""Written text as a person would say it, where the synthesiser's own reading of numbers falls short.

hibari reads amounts, units, years, ordinals and long telephone numbers itself. What is mended here was heard to go
wrong with it: "$8/month" ("dollars month"), "9 am" (read as the verb), ranges of times, short telephone numbers.
"""

import re
from collections.abc import Callable

_PERIODS = {"mo": "month", "yr": "year", "hr": "hour", "h": "hour", "wk": "week", "pp": "person", "ea": "item"}
_PERIOD = "mo|month|yr|year|hr|hour|h|wk|week|day|night|person|pp|ea|item"
_WORDS = {"&": "and", "w/": "with", "e.g.": "for example", "i.e.": "that is", "approx.": "about"}


def _per(match: re.Match[str]) -> str:
    period = match["period"].lower()
    return f" {'an' if period in ('hr', 'h', 'hour') else 'a'} {_PERIODS.get(period, period)}"


def _half_day(match: re.Match[str]) -> str:
    return f"{match['time']} {match['half'].upper()}.M."


def _digit_by_digit(match: re.Match[str]) -> str:
    return ", ".join(" ".join(group) for group in re.findall(r"\d+", match[0]))


_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"https?://(?:www\.)?|[*_`#~^|<>\[\]{}]+"), lambda match: ""),
    (re.compile(r"(?<!\S)(?:" + "|".join(map(re.escape, _WORDS)) + r")(?!\S)"), lambda match: _WORDS[match[0]]),
    (re.compile(r"(?<![\d-])(?:\(?\d{3}\)?[ -])?\d{3}-\d{4}(?![\d-])"), _digit_by_digit),
    (re.compile(r"\b24/7\b"), lambda match: "24 7"),
    (re.compile(rf"(?<=[\da-z])\s?/\s?(?P<period>{_PERIOD})\b", re.I), _per),
    (re.compile(r"(?P<time>\b\d{1,2}(?::\d{2})?)\s?(?P<half>[ap])\.?m\b\.?", re.I), _half_day),
    (re.compile(r"(?<=[\d.])\s?[-\u2013\u2014]\s?(?=\d)"), lambda match: " to "),
)  # fmt: skip


def spoken_form(text: str) -> str:
    """What to give the synthesiser for this text."""
    for pattern, say in _RULES:
        text = pattern.sub(say, text)
    return re.sub(r"\s+", " ", text).strip()
