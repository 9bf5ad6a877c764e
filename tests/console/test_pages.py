"""What the server renders, without a browser."""

import re
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
from jinja2 import nodes

from app.console import contexts
from app.console.contexts import clock, line_view, masked, moment
from app.console.pages import templates
from app.store import Store, TranscriptLine
from tests.calls import CALL, begin, said, written


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        ("+15550100001", "••• 0001"),
        ("15550100044", "••• 0044"),
        ("", "Unknown caller"),
        ("anonymous", "Unknown caller"),
        ("sip:anna@example.com", "Unknown caller"),
        ("911", "Unknown caller"),
    ],
)
def test_no_more_of_a_caller_is_shown_than_four_digits(number: str, shown: str) -> None:
    assert masked(number) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (7.99, "0:07"), (754, "12:34"), (3723, "1:02:03")])
def test_seconds_are_shown_as_on_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_moment_is_told_in_utc_wherever_it_came_from() -> None:
    at = datetime(2026, 11, 22, 21, 0, 5, tzinfo=timezone(timedelta(hours=9)))

    assert moment(at) == moment(at.astimezone(UTC))
    assert moment(at).iso == "2026-11-22T12:00:05Z"
    assert moment(at).utc == "22 Nov 2026 12:00:05 UTC"


@pytest.mark.parametrize(
    ("heard", "parts"),
    [
        (None, ("It is open till ten.", "")),
        ("It is open", ("It is open ", "till ten.")),
        ("", ("", "It is open till ten.")),
        ("It is open till ten.", ("It is open till ten.", "")),
        ("something else", ("It is open till ten.", "")),
    ],
)
def test_what_the_caller_did_not_hear_is_told_apart(heard: str | None, parts: tuple[str, str]) -> None:
    view = line_view(TranscriptLine(1, "agent", "It is open till ten.", 1, 3, True, heard), "Operator")

    assert (view.heard, view.unheard) == parts


def test_hostile_words_names_and_numbers_stay_words(store: Store, url: str) -> None:
    evil = "</p><script>alert('1')</script>\"onload=\"alert(1)"
    store.call_started(CALL, carrier=evil, carrier_call_id=evil, persona=evil, engine=evil, caller=evil, called=evil)
    store.line(CALL, said(0, evil))
    written(store)

    for path in ("/", f"/calls/{CALL}"):
        html = httpx.get(url + path).text
        assert "<script>alert" not in html
        assert '"onload' not in html
        assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;" in html


def test_the_whole_number_of_a_caller_is_nowhere_in_the_pages(store: Store, url: str) -> None:
    begin(store)
    written(store)

    for path in ("/", f"/calls/{CALL}"):
        html = httpx.get(url + path).text
        assert "••• 0001" in html
        assert "5550100001" not in html


def test_pages_run_nothing_but_the_consoles_own_files(url: str) -> None:
    answer = httpx.get(url)

    assert answer.headers["content-security-policy"].startswith("default-src 'self'; base-uri 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    sources = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert {source for source in sources if not source.startswith(("/", "#"))} == set()
    assert "<style" not in answer.text
    assert not re.search(r"<script(?! src=)", answer.text)


@pytest.mark.parametrize("name", ["console.css", "console.js", "icon.svg"])
def test_the_files_of_the_pages_are_not_sent_again_while_they_are_the_same(url: str, name: str) -> None:
    first = httpx.get(f"{url}/static/{name}")
    again = httpx.get(f"{url}/static/{name}", headers={"If-None-Match": first.headers["etag"]})

    assert (first.status_code, again.status_code) == (200, 304)
    assert first.headers["x-content-type-options"] == "nosniff"


def test_a_call_that_is_not_there_is_a_page_too(url: str) -> None:
    answer = httpx.get(f"{url}/calls/none")

    assert answer.status_code == 404
    assert "There is no such call" in answer.text
    assert answer.headers["content-type"].startswith("text/html")


def test_every_page_is_made_of_its_context_alone() -> None:
    """The templates see `page`, and what they import; anything else would be undefined when rendered."""
    for path in Path(str(templates.loader.searchpath[0])).iterdir():  # type: ignore[union-attr]
        tree = templates.parse(path.read_text())
        imported = {node.target for node in tree.find_all(nodes.Import)}
        loaded = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
        stored = {node.name for node in tree.find_all(nodes.Name) if node.ctx in ("store", "param")}
        defined = {node.name for node in tree.find_all(nodes.Macro)}
        assert loaded - stored - imported - defined <= {"page"}, path.name


def test_contexts_hold_nothing_that_no_template_shows() -> None:
    shown = "".join(path.read_text() for path in (Path(contexts.__file__).parent / "templates").iterdir())
    pages = (contexts.BoardPage, contexts.CallPage, contexts.ErrorPage)
    for view in (*pages, contexts.CallView, contexts.LineView, contexts.Moment):
        for field in fields(view):
            assert re.search(rf"\.{field.name}\b", shown), f"{view.__name__}.{field.name}"
