"""A store, the page that shows it over a real socket, and a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from app.store import Store
from tests.serving import served, small_app

# The last four keep it from looking for anything beyond this machine.
FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(f"sqlite:///{tmp_path}/calls.db")
    yield store
    store.close()


@pytest.fixture
def url(store: Store) -> Iterator[str]:
    with served(small_app(store), store) as url:
        yield url


# Not for longer than the module: Playwright's own event loop would stand in the way of the tests that are async.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A page that fails its test by any error on its console, a refusal by the content security policy included."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, timezone_id="Asia/Tokyo", locale="en-GB")
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    # A service that is gone for a moment shows as a refused connection, and is what one test is about.
    assert [error for error in errors if "ERR_CONNECTION" not in error and "ERR_INCOMPLETE" not in error] == []
