"""The page in a real browser, while calls begin, are talked through and end."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from app.store import Store, TranscriptLine
from tests.calls import CALL, OTHER, begin, said, written
from tests.serving import served, small_app


def test_a_newcomer_is_told_what_to_do(page: Page, url: str) -> None:
    page.goto(url)

    expect(page.get_by_role("heading", name="No call yet")).to_be_visible()
    expect(page.get_by_text("make demo")).to_be_visible()


def test_a_call_appears_is_followed_word_by_word_and_moves_to_the_finished_ones(
    page: Page, url: str, store: Store
) -> None:
    page.goto(url)
    expect(page.get_by_role("status")).to_have_text("Live")

    begin(store, at=datetime.now(UTC))
    card = page.locator(f"#call-{CALL}")
    expect(card).to_contain_text("••• 0001")
    expect(card).to_contain_text("No words yet.")

    store.line(CALL, said(0, "good", final=False))
    expect(card.locator(".line.caller")).to_have_text(re.compile("good"))
    store.line(CALL, said(0, "good morning"))
    store.line(CALL, TranscriptLine(1, "agent", "Hello!", 2.0, 3.0, True))
    expect(card.locator(".line")).to_have_count(2)
    expect(card.locator(".line.caller .text")).to_have_text("good morning")
    expect(card.locator(".line.agent .name")).to_have_text("Operator")

    store.call_ended(CALL, outcome="completed", reason="the caller hung up", duration_s=65.0)
    row = page.locator(f".rows #call-{CALL}")
    expect(row).to_contain_text("Completed")
    expect(row).to_contain_text("1:05")
    expect(page.get_by_text("Nobody is on the line.")).to_be_visible()


def test_hostile_words_do_nothing_when_they_come_live(page: Page, url: str, store: Store) -> None:
    begin(store)
    page.goto(url)
    expect(page.get_by_role("status")).to_have_text("Live")
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    store.line(CALL, said(0, evil))

    expect(page.locator(".line .text")).to_have_text(evil)
    assert "owned" not in page.title()
    assert page.locator(".line img").count() == 0


def test_the_board_keeps_the_last_words_and_the_calls_own_page_all_of_them(page: Page, url: str, store: Store) -> None:
    begin(store)
    page.goto(url)
    expect(page.get_by_role("status")).to_have_text("Live")
    for number in range(9):
        store.line(CALL, said(number, f"line {number}"))

    expect(page.locator(".line .text")).to_have_text([f"line {number}" for number in range(3, 9)])
    page.get_by_role("link", name="••• 0001").click()
    expect(page.locator(".line .text")).to_have_text([f"line {number}" for number in range(9)])


def test_words_of_another_call_never_show_on_this_ones_page(page: Page, url: str, store: Store) -> None:
    begin(store, CALL)
    begin(store, OTHER)
    written(store)
    page.goto(f"{url}/calls/{CALL}")
    expect(page.get_by_role("status")).to_have_text("Live")

    store.line(OTHER, said(0, "not for here"))
    store.line(CALL, said(0, "for here"))

    expect(page.locator(".line .text")).to_have_text(["for here"])


def test_lines_are_in_order_whichever_was_heard_of_first(page: Page, url: str, store: Store) -> None:
    begin(store)
    written(store)
    page.goto(f"{url}/calls/{CALL}")
    expect(page.get_by_role("status")).to_have_text("Live")
    for number in (2, 0, 1):
        store.line(CALL, said(number, str(number)))
        written(store)

    expect(page.locator(".line .text")).to_have_text(["0", "1", "2"])


def test_a_live_calls_page_becomes_a_finished_ones_when_it_ends(page: Page, url: str, store: Store) -> None:
    begin(store)
    written(store)
    page.goto(f"{url}/calls/{CALL}")
    expect(page.get_by_role("status")).to_have_text("Live")

    store.line(CALL, TranscriptLine(0, "agent", "Breakfast is from seven to ten.", 1, 4, True, "Breakfast is"))
    store.call_ended(CALL, outcome="failed", reason="the media stream broke", duration_s=5.0)

    expect(page.get_by_text("the media stream broke")).to_be_visible()
    expect(page.locator(".outcome")).to_have_text("Failed")
    expect(page.get_by_role("status")).to_have_text("")
    unheard = page.locator(".unheard")
    expect(unheard).to_have_text("from seven to ten.")
    expect(unheard).to_have_css("text-decoration-line", "line-through")


def test_the_page_catches_up_by_itself_after_the_service_was_started_again(page: Page, tmp_path: Path) -> None:
    """The very document stays: what a reader has marked in it would still be there."""
    address = f"sqlite:///{tmp_path}/again.db"
    store = Store.open(address)
    with served(small_app(store), store) as url:
        page.goto(url)
        expect(page.get_by_role("status")).to_have_text("Live")
        page.evaluate("window.same = true")
    store.close()
    expect(page.get_by_role("status")).to_have_text("Reconnecting…")

    store = Store.open(address)
    begin(store)
    store.line(CALL, said(0, "said meanwhile"))
    with served(small_app(store), store, port=int(url.rsplit(":", 1)[1])):
        expect(page.locator(".line .text")).to_have_text("said meanwhile", timeout=15_000)
        expect(page.get_by_role("status")).to_have_text("Live")
        assert page.evaluate("window.same") is True
    store.close()


def test_times_are_the_readers_own_and_utc_on_hover(page: Page, url: str, store: Store) -> None:
    begin(store, at=datetime(2026, 1, 2, 20, 30, tzinfo=UTC))
    store.call_ended(CALL, outcome="completed", reason="", duration_s=1.0)
    written(store)
    page.goto(url)

    time = page.locator("time")
    expect(time).to_have_text("3 Jan, 05:30")
    expect(time).to_have_attribute("title", "02 Jan 2026 20:30:00 UTC")


def test_the_board_is_reached_and_opened_by_keyboard_and_keeps_the_focus_while_it_changes(
    page: Page, url: str, store: Store
) -> None:
    begin(store, CALL)
    written(store)
    page.goto(url)
    expect(page.get_by_role("status")).to_have_text("Live")
    for _ in range(3):
        page.keyboard.press("Tab")
    focused = page.locator(":focus")
    expect(focused).to_have_attribute("href", f"/calls/{CALL}")

    begin(store, OTHER)
    expect(page.locator(f"#call-{OTHER}")).to_be_visible()
    expect(focused).to_have_attribute("href", f"/calls/{CALL}")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{url}/calls/{CALL}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(chromium: Browser, url: str, store: Store, scheme: str, width: int) -> None:
    long_word = "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen" * 3
    begin(store, CALL, datetime.now(UTC) - timedelta(hours=30))
    store.line(CALL, TranscriptLine(0, "agent", long_word, 1, 2, True, ""))
    store.line(CALL, said(1, long_word))
    begin(store, OTHER, datetime.now(UTC) - timedelta(hours=30))
    store.call_ended(OTHER, outcome="interrupted", reason=long_word, duration_s=36_000)
    written(store)
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()

    for path in ("/", f"/calls/{CALL}", f"/calls/{OTHER}", "/calls/none"):
        page.goto(url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
