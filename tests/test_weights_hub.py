"""PersonaPlex's files come into the hub's cache whole; each thing that can go wrong is one sentence with a remedy."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import socket

import pytest
from huggingface_hub import constants, hf_hub_download
from pydantic import SecretStr

from app.weights_hub import (
    PERSONAPLEX,
    HubFault,
    HubFile,
    Release,
    Unreachable,
    account,
    cached_folder,
    fetch,
    missing,
    usable_token,
)
from tests.fake_hub import FakeModelRepo, serving
from tests.service import wait_for

WEIGHTS = bytes(range(256)) * 1000
FILES = {"config.json": b"{}", "voices.tgz": b"the voices", "model.safetensors": WEIGHTS}
TOKEN = "hf_fakeFAKEfake0123456789"


def release_of(files: dict[str, bytes]) -> Release:
    held = FakeModelRepo()
    hashed = {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != "config.json"}
    return Release(
        held.repo, held.commit, tuple(HubFile(name, len(files[name]), sha256) for name, sha256 in hashed.items())
    )


RELEASE = release_of(FILES)
BLOBS = f"models--{RELEASE.repo.replace('/', '--')}/blobs"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own, no token of this user's, and blocks small enough to be cut."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModelRepo]:
    with serving(FakeModelRepo(files=dict(FILES))) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def quiet(line: str) -> None:
    pass


def fault(token: str | None = None) -> str:
    with pytest.raises(HubFault) as caught:
        fetch(RELEASE, token, quiet)
    said = str(caught.value)
    assert "\n" not in said
    assert TOKEN not in said
    return said


def gets(hub: FakeModelRepo) -> list[tuple[str, str | None]]:
    return [(path.rpartition("/")[2], wanted) for path, wanted, _ in hub.asked]


# --- what arrives


def test_every_file_arrives_whole_in_the_hubs_own_cache(hub: FakeModelRepo, cache: Path) -> None:
    folder = fetch(RELEASE, None, quiet)

    assert folder == cached_folder(RELEASE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert missing(RELEASE) == []
    assert not list((cache / BLOBS).glob("*.incomplete"))


def test_other_programs_find_what_was_fetched(hub: FakeModelRepo, cache: Path) -> None:
    fetch(RELEASE, None, quiet)
    hub.refusal = (500, "", "down")

    found = hf_hub_download(RELEASE.repo, "model.safetensors", revision=RELEASE.revision, cache_dir=cache)

    assert Path(found).read_bytes() == WEIGHTS


def test_a_second_download_asks_nobody(hub: FakeModelRepo) -> None:
    fetch(RELEASE, None, quiet)
    hub.asked, hub.heads = [], 0

    fetch(RELEASE, None, quiet)

    assert (hub.asked, hub.heads) == ([], 0)


def test_the_token_goes_along_and_opens_the_files(hub: FakeModelRepo) -> None:
    hub.token = TOKEN
    fetch(RELEASE, TOKEN, quiet)

    assert {authorization for _, _, authorization in hub.asked} == {f"Bearer {TOKEN}"}


def test_what_goes_on_is_told(hub: FakeModelRepo) -> None:
    told: list[str] = []
    fetch(RELEASE, None, told.append)

    assert told == [
        "voices.tgz: 0.0 MB to fetch",
        "voices.tgz: checking",
        "model.safetensors: 0.3 MB to fetch",
        "model.safetensors: checking",
    ]


# --- cut connections


def test_a_connection_that_is_cut_is_taken_up_where_it_broke(hub: FakeModelRepo) -> None:
    hub.cuts_after = [len(FILES["voices.tgz"]), 90_000]
    folder = fetch(RELEASE, None, quiet)

    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert gets(hub)[:3] == [("voices.tgz", None), ("model.safetensors", None), ("model.safetensors", "bytes=90000-")]


def test_a_connection_that_is_reset_is_taken_up_where_it_broke(hub: FakeModelRepo, cache: Path) -> None:
    part = cache / BLOBS / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    hub.cuts_after = [len(FILES["voices.tgz"]), 90_000]

    def until_all_of_it_is_kept() -> None:
        if hub.asked[-1][0].endswith("model.safetensors"):
            wait_for(lambda: part.stat().st_size == 90_000)

    hub.before_reset = until_all_of_it_is_kept

    assert (fetch(RELEASE, None, quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert ("model.safetensors", "bytes=90000-") in gets(hub)


def test_a_run_that_was_cut_short_is_gone_on_from_by_the_next(hub: FakeModelRepo, cache: Path) -> None:
    part = cache / BLOBS / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:150_000])
    folder = fetch(RELEASE, None, quiet)

    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert ("model.safetensors", "bytes=150000-") in gets(hub)


def test_a_hub_that_goes_down_meanwhile_leaves_what_was_fetched(hub: FakeModelRepo, cache: Path) -> None:
    def down_after_a_while() -> None:
        if hub.asked and hub.asked[-1][0].endswith("model.safetensors"):
            hub.cuts_after, hub.refusal = [50_000], (503, "", "")

    hub.before_answer = down_after_a_while

    assert fault().startswith("The hub answered 503 Service Unavailable; what was fetched is kept")
    assert [path.stat().st_size for path in (cache / BLOBS).glob("*.incomplete")] == [50_000]


def test_a_hub_that_ignores_the_range_sends_the_file_anew(hub: FakeModelRepo, cache: Path) -> None:
    part = cache / BLOBS / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:150_000])
    hub.honours_range = False

    assert (fetch(RELEASE, None, quiet) / "model.safetensors").read_bytes() == WEIGHTS


def test_two_downloads_at_once_fetch_each_file_once(hub: FakeModelRepo) -> None:
    told: list[str] = []
    begun, both = threading.Event(), threading.Event()

    def hold_the_first() -> None:
        begun.set()
        both.wait(20)

    def tell(line: str) -> None:
        told.append(line)
        both.set()

    hub.before_answer = hold_the_first
    first = threading.Thread(target=fetch, args=(RELEASE, None, quiet))
    second = threading.Thread(target=fetch, args=(RELEASE, None, tell))
    first.start()
    begun.wait(20)
    second.start()
    first.join(20)
    second.join(20)

    assert told == ["waiting for another download"]
    assert sorted(gets(hub)) == [("config.json", None), ("model.safetensors", None), ("voices.tgz", None)]


# --- files that are not right


def test_a_file_with_another_hash_is_not_taken(hub: FakeModelRepo, cache: Path) -> None:
    hub.files["model.safetensors"] = WEIGHTS[::-1]

    assert "was not taken" in fault()
    assert [file.name for file in missing(RELEASE)] == ["voices.tgz", "model.safetensors"]
    assert not list((cache / BLOBS).glob("*.incomplete"))


def test_a_file_of_another_size_is_not_begun(hub: FakeModelRepo) -> None:
    hub.files["model.safetensors"] = WEIGHTS[:-1]

    assert f"with {len(WEIGHTS) - 1} bytes where {len(WEIGHTS)} are right" in fault()
    assert "model.safetensors" not in {name for name, _ in gets(hub)}


def test_a_file_in_the_cache_that_was_cut_is_fetched_again(hub: FakeModelRepo) -> None:
    folder = fetch(RELEASE, None, quiet)
    (folder / "model.safetensors").resolve().write_bytes(WEIGHTS[:1000])
    assert [file.name for file in missing(RELEASE)] == ["model.safetensors"]

    fetch(RELEASE, None, quiet)

    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


# --- tokens


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("hf_abc\u2026xyz", "U+2026 HORIZONTAL ELLIPSIS"),
        ("\u201chf_abc\u201d", "U+201C LEFT DOUBLE QUOTATION MARK"),
        ('"hf_abc"', "U+0022 QUOTATION MARK"),
        ("hf_a bc", "U+0020 SPACE"),
        ("hf_a\nbc", "U+000A"),
        ("hf_\u0430bc", "U+0430 CYRILLIC SMALL LETTER A"),
        ("hf_a\udcffbc", "U+DCFF"),
    ],
)
def test_a_malformed_token_is_named_by_its_wrong_character_and_never_shown(token: str, shown: str) -> None:
    with pytest.raises(HubFault) as caught:
        usable_token(SecretStr(token))

    said = str(caught.value)
    assert said.startswith(f"HF_TOKEN is malformed: it holds {shown}")
    assert "https://huggingface.co/settings/tokens" in said
    assert "hf_" not in said.removeprefix("HF_TOKEN")


def test_a_token_may_stand_between_spaces_or_before_a_line_break() -> None:
    assert usable_token(SecretStr(f" {TOKEN}\n")) == TOKEN


def test_without_a_setting_the_token_of_a_login_is_used(tmp_path: Path) -> None:
    assert usable_token(None) is None

    (tmp_path / "token").write_text(TOKEN)
    assert usable_token(None) == TOKEN
    assert usable_token(SecretStr("hf_other")) == "hf_other"


@pytest.mark.parametrize("content", ["hf_abc\u2026".encode(), b"hf_\xff\xfe"])
def test_a_malformed_token_of_a_login_is_named_by_its_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)

    with pytest.raises(HubFault, match=str(tmp_path / "token")):
        usable_token(None)


def test_the_hub_says_whose_token_it_is(hub: FakeModelRepo) -> None:
    hub.token = TOKEN

    assert account(TOKEN) == "ada"
    with pytest.raises(HubFault, match="refuses the token"):
        account("hf_other")


# --- answers that are none


def test_a_missing_token_is_answered_with_the_three_steps(hub: FakeModelRepo) -> None:
    hub.token = TOKEN

    assert fault() == (
        f"The hub wants to know who asks: accept the licence of {RELEASE.repo} on {RELEASE.page}, make a token on "
        "https://huggingface.co/settings/tokens, set HF_TOKEN to it and run: personaline download"
    )


def test_a_token_that_the_hub_does_not_know_is_to_be_replaced(hub: FakeModelRepo) -> None:
    hub.token = "hf_another"

    assert fault(TOKEN).startswith("The hub refuses the token (401): make another on https://huggingface.co/settings")


def test_a_licence_not_accepted_names_the_page(hub: FakeModelRepo) -> None:
    hub.refusal = (403, "GatedRepo", "Access to this model is restricted and you are not in the authorized list.")

    assert fault(TOKEN) == (
        "The token is good, but its account has not accepted the licence: accept the licence of "
        f"{RELEASE.repo} on {RELEASE.page}, then run: personaline download"
    )


def test_a_token_without_the_right_is_told_which(hub: FakeModelRepo) -> None:
    hub.refusal = (403, "", "Please enable access to public gated repositories in your fine-grained token settings.")

    said = fault(TOKEN)
    assert "let it read public gated repositories" in said
    assert "fine-grained token settings" in said


def test_a_repository_that_is_gone_is_named(hub: FakeModelRepo) -> None:
    hub.repo = "someone/else"

    assert f"has no repository {RELEASE.repo}" in fault(TOKEN)


def test_a_revision_that_is_gone_is_named(hub: FakeModelRepo) -> None:
    hub.commit = "f" * 40

    assert f"{RELEASE.repo} has no revision {RELEASE.revision}" in fault(TOKEN)


def test_a_file_that_is_gone_is_named(hub: FakeModelRepo) -> None:
    del hub.files["voices.tgz"]

    assert "voices.tgz is not there any more" in fault()


def test_a_hub_that_is_down_is_to_be_asked_later(hub: FakeModelRepo) -> None:
    hub.refusal = (503, "", "")

    assert fault().startswith("The hub answered 503 Service Unavailable")


def test_something_else_that_answers_is_no_hub(hub: FakeModelRepo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "ftp://127.0.0.1")

    assert "does not answer as the hub does" in fault()


def test_without_a_network_the_reason_and_the_remedy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")

        said = fault()

    assert "Connection refused" in said
    assert "Check the network and the proxy" in said


def test_an_offline_hub_is_not_asked(hub: FakeModelRepo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE is set"):
        fetch(RELEASE, None, quiet)
    assert (hub.asked, hub.heads) == ([], 0)


# --- the disk


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub: FakeModelRepo) -> None:
    with pytest.raises(HubFault, match=r"GB free and .* GB are still to be fetched. Free some, or set HF_HOME"):
        fetch(RELEASE, None, quiet, lambda folder: len(WEIGHTS))
    assert hub.asked == []


def test_room_for_what_is_still_missing_is_room_enough(hub: FakeModelRepo, cache: Path) -> None:
    part = cache / BLOBS / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:150_000])

    fetch(RELEASE, None, quiet, lambda folder: len(WEIGHTS) - 150_000 + len(FILES["voices.tgz"]))

    assert missing(RELEASE) == []


def test_a_disk_that_fills_up_keeps_what_fitted(hub: FakeModelRepo, cache: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    code = f"""if True:
        import resource
        from huggingface_hub import constants
        from app.weights_hub import HubFault, HubFile, Release, fetch
        constants.HF_HUB_CACHE, constants.DOWNLOAD_CHUNK_SIZE = {str(cache)!r}, 10_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        try:
            fetch({RELEASE!r}, None, lambda line: None)
        except HubFault as fault:
            print(fault)
        """
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=60)

    assert "is full" in ran.stdout, ran.stderr
    assert "what was fetched is kept. Free some, or set HF_HOME" in ran.stdout
    hub.asked = []
    assert (fetch(RELEASE, None, quiet) / "model.safetensors").read_bytes() == WEIGHTS
    assert ("model.safetensors", "bytes=150000-") in gets(hub)


# --- what is pinned


def test_the_release_is_pinned_by_commit_and_hashes() -> None:
    assert len(PERSONAPLEX.revision) == 40
    assert {len(file.sha256) for file in PERSONAPLEX.files} == {64}
    assert sum(file.size_bytes for file in PERSONAPLEX.files) == 17_134_167_199
