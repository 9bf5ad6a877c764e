"""PersonaPlex's files from the Hugging Face hub, into the hub's own cache, where other programs find them too.

`hf_hub_download` alone would begin 16.7 GB from zero after every interruption: huggingface_hub 2.4 names its unfinished
file at random and deletes it. So each file is first completed under a fixed name beside the cache's blobs, by the hub's
own `http_get`, checked by its SHA-256 and made a blob; `hf_hub_download` then finds it there and links it into the
snapshot. `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean to the hub's own tools.

Everything here blocks; call it from a command or a worker thread.
"""

import errno
import hashlib
import os
import shutil
import string
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import (
    HfApi,
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from pydantic import SecretStr

TOKEN_PAGE = "https://huggingface.co/settings/tokens"
_AGAIN = "personaline download"
_BLOCK_BYTES = 1 << 20
_OF_TOKENS = frozenset(string.ascii_letters + string.digits + "-._~+/=")  # RFC 6750, section 2.1


class HubFault(Exception):
    """The files cannot be had. The message is one line and ends with what to do."""


class Unreachable(HubFault):
    """The hub gave no answer, or is not to be asked."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of known size and SHA-256 (lower-case hex)."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Release:
    """One commit of a repository on the hub. `config` is small and has no fixed hash."""

    repo: str
    revision: str
    files: tuple[HubFile, ...]
    config: str = "config.json"

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{self.repo}"


PERSONAPLEX = Release(
    repo="nvidia/personaplex-7b-v1",
    revision="fdaf4090a61cb315c138a1faee287ffd6c716309",
    files=(
        HubFile(
            "tokenizer_spm_32k_3.model",
            552_778,
            "78d4336533ddc26f9acf7250d7fb83492152196c6ea4212c841df76933f18d2d",
        ),
        HubFile("voices.tgz", 6_095_521, "8564e9ca7a06ca723b07c3a77c623f0faa5937d04b2647b3a727b06c5ca0b7bb"),
        HubFile(
            "tokenizer-e351c8d8-checkpoint125.safetensors",
            384_644_900,
            "09b782f0629851a271227fb9d36db65c041790365f11bbe5d3d59369cf863f50",
        ),
        HubFile(
            "model.safetensors", 16_742_874_000, "db1290db583cdaa6cb4de444ed279e0b586ca2a372b41434b07a7461c8c0e2f4"
        ),
    ),
)

Say = Callable[[str], None]
"""Takes one line on what goes on now."""


def cached_folder(release: Release = PERSONAPLEX) -> Path:
    """The folder in the hub's cache where the files are, or would be."""
    return _repo_folder(release) / "snapshots" / release.revision


def missing(release: Release = PERSONAPLEX) -> list[HubFile]:
    """The files that the hub's cache does not hold in their whole size."""
    return [file for file in release.files if _cached_bytes(release, file) != file.size_bytes]


def usable_token(setting: SecretStr | None) -> str | None:
    """`HF_TOKEN`, else the token that `hf auth login` left; None where there is neither.

    Raises:
        HubFault: it holds characters that no token has. The message never shows the token.
    """
    try:
        token = setting.get_secret_value().strip() if setting else get_token()
    except UnicodeDecodeError as error:
        raise HubFault(f"{constants.HF_TOKEN_PATH} is no text: log in again with: hf auth login") from error
    wrong = next((character for character in token or "" if character not in _OF_TOKENS), None)
    if wrong is not None:
        where = "HF_TOKEN" if setting else constants.HF_TOKEN_PATH
        shown = f"U+{ord(wrong):04X} {unicodedata.name(wrong, '')}".strip()
        raise HubFault(
            f"{where} is malformed: it holds {shown}, and only ASCII letters, digits, _ and - are right. "
            f"Copy the token again from {TOKEN_PAGE}"
        )
    return token or None


def account(token: str) -> str:
    """Whose token this is, as the hub says.

    Raises:
        HubFault: the hub refuses the token. Unreachable: it cannot be asked.
    """
    with _hub_faults(PERSONAPLEX, token):
        return str(HfApi(endpoint=_endpoint(), token=token).whoami()["name"])


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def fetch(release: Release, token: str | None, say: Say, free_bytes: Callable[[Path], int] = _free_bytes) -> Path:
    """Have every file of a release in the hub's cache, whole and checked; at once if they are there.

    Returns:
        The folder that holds them.

    Raises:
        HubFault
    """
    with _held(release, say):
        wanted = missing(release)
        with _hub_faults(release, token):
            offers = {file: _offer(release, file.name, token) for file in wanted}
        _need_space(release, wanted, free_bytes)
        for file, offer in offers.items():
            _complete(release, file, offer, token, say)
        with _hub_faults(release, token):
            for name in [release.config, *(file.name for file in wanted)]:
                _link(release, name, token)
    return cached_folder(release)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _repo_folder(release: Release) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{release.repo.replace('/', '--')}"


def _cached_bytes(release: Release, file: HubFile) -> int:
    found = try_to_load_from_cache(release.repo, file.name, cache_dir=constants.HF_HUB_CACHE, revision=release.revision)
    return Path(found).stat().st_size if isinstance(found, str) else 0


def _partial(release: Release, file: HubFile) -> Path:
    return _repo_folder(release) / "blobs" / f"{file.sha256}.incomplete"


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _held(release: Release, say: Say) -> Iterator[None]:
    """The cache's folders, made, and locked against a second download of the same files."""
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / _repo_folder(release).name
    with _disk_faults(release):
        locks.mkdir(parents=True, exist_ok=True)
        (_repo_folder(release) / "blobs").mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / "personaline.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("waiting for another download")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _need_space(release: Release, wanted: list[HubFile], free_bytes: Callable[[Path], int]) -> None:
    needed = sum(file.size_bytes - _size_bytes(_partial(release, file)) for file in wanted)
    folder = _repo_folder(release)
    free = free_bytes(folder)
    if free < needed:
        raise HubFault(
            f"The disk of {folder} has {free / 1e9:,.1f} GB free and {needed / 1e9:,.1f} GB are still to be fetched. "
            f"Free some, or set HF_HOME to a folder on another disk, then run: {_AGAIN}"
        )


# --- one file


def _offer(release: Release, name: str, token: str | None) -> HfFileMetadata:
    url = hf_hub_url(release.repo, name, revision=release.revision, endpoint=_endpoint())
    # False keeps the hub from looking for a token by itself: the one that counts is known here.
    return get_hf_file_metadata(url, token=token or False, endpoint=_endpoint())


def _complete(release: Release, file: HubFile, offer: HfFileMetadata, token: str | None, say: Say) -> None:
    """Fetch what is missing of a file and make it the cache's blob."""
    if offer.size != file.size_bytes:
        raise HubFault(
            f"{_endpoint()} offers {file.name} with {offer.size} bytes where {file.size_bytes} are right: that is "
            f"another file. Check HF_ENDPOINT, then run: {_AGAIN}"
        )
    partial = _partial(release, file)
    if _size_bytes(partial) > file.size_bytes:
        partial.unlink()
    say(f"{file.name}: {(file.size_bytes - _size_bytes(partial)) / 1e6:,.1f} MB to fetch")
    with _hub_faults(release, token):
        while _size_bytes(partial) < file.size_bytes:
            _go_on(release, file, partial, token)
    say(f"{file.name}: checking")
    _settle(file, partial, partial.with_name(offer.etag or file.sha256))


def _go_on(release: Release, file: HubFile, partial: Path, token: str | None) -> None:
    """Fetch the rest. A connection that breaks is an error only if it brought nothing."""
    before_bytes = _size_bytes(partial)
    url = hf_hub_url(release.repo, file.name, revision=release.revision, endpoint=_endpoint())
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with partial.open("ab") as out:
            http_get(
                url, out, resume_size=before_bytes, headers=headers, expected_size=file.size_bytes,
                displayed_filename=file.name,
            )  # fmt: skip
    except httpx2.TransportError:
        if _size_bytes(partial) <= before_bytes:
            raise


def _settle(file: HubFile, partial: Path, blob: Path) -> None:
    digest = hashlib.sha256()
    with partial.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != file.sha256:
        partial.unlink()
        raise HubFault(
            f"What was sent as {file.name} has the SHA-256 {digest.hexdigest()} where {file.sha256} is right, so it "
            f"was not taken. Fetch it again with: {_AGAIN}"
        )
    partial.replace(blob)


def _link(release: Release, name: str, token: str | None) -> None:
    """Put a blob into the snapshot, or fetch it if it is small. A file there of another size is replaced."""
    linked = cached_folder(release) / name
    sizes = {file.name: file.size_bytes for file in release.files}
    if linked.exists() and linked.stat().st_size != sizes.get(name, linked.stat().st_size):
        linked.unlink()
    hf_hub_download(
        release.repo, name, revision=release.revision, cache_dir=constants.HF_HUB_CACHE, token=token or False,
        endpoint=_endpoint(),
    )  # fmt: skip


# --- what goes wrong


@contextmanager
def _disk_faults(release: Release) -> Iterator[None]:
    folder = _repo_folder(release)
    elsewhere = f"or set HF_HOME to another folder, then run: {_AGAIN}"
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
                said = f"The disk of {folder} is full ({error.strerror}); what was fetched is kept. Free some, "
            case errno.EACCES | errno.EPERM | errno.EROFS:
                said = f"{error.filename or folder}: {error.strerror}. Let this user write in {folder}, "
            case _:
                said = f"{error.filename or folder}: {error.strerror or error}. Mend this, "
        raise HubFault(said + elsewhere) from error


@contextmanager
def _hub_faults(release: Release, token: str | None) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        raise HubFault(_refusal(error, release, token)) from error
    except OfflineModeIsEnabled as error:
        raise Unreachable(
            f"The hub is not asked because HF_HUB_OFFLINE is set. Unset it, then run: {_AGAIN}"
        ) from error
    except (FileMetadataError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise Unreachable(
            f"{_endpoint()} does not answer as the hub does ({_first_line(error)}). "
            f"Check HF_ENDPOINT and the proxy, then run: {_AGAIN}"
        ) from error
    except (EntryNotFoundError, httpx2.HTTPError) as error:
        reason = _first_line(error.__cause__ or error)
        raise Unreachable(
            f"{_endpoint()} cannot be reached ({reason}); what was fetched is kept. "
            f"Check the network and the proxy, then run: {_AGAIN}"
        ) from error


def _refusal(error: HfHubHTTPError, release: Release, token: str | None) -> str:
    """What an answer of the hub other than "here it is" means for the user."""
    status, said = error.response.status_code, error.response.headers.get("X-Error-Message", "")
    accept = f"accept the licence of {release.repo} on {release.page}"
    match error:
        case RevisionNotFoundError():
            return f"{release.repo} has no revision {release.revision} any more. Update Personaline, then run: {_AGAIN}"
        case EntryNotFoundError():
            return f"{error.response.url} is not there any more. Update Personaline, then run: {_AGAIN}"
        case _ if status == httpx2.codes.UNAUTHORIZED and token is None:
            return (
                f"The hub wants to know who asks: {accept}, make a token on {TOKEN_PAGE}, set HF_TOKEN to it and "
                f"run: {_AGAIN}"
            )
        case _ if status == httpx2.codes.UNAUTHORIZED:
            return (
                f"The hub refuses the token (401): make another on {TOKEN_PAGE}, set HF_TOKEN to it and run: {_AGAIN}"
            )
        case GatedRepoError():
            return f"The token is good, but its account has not accepted the licence: {accept}, then run: {_AGAIN}"
        case RepositoryNotFoundError():
            return f"{_endpoint()} has no repository {release.repo}. Check HF_ENDPOINT, then run: {_AGAIN}"
        case _ if status == httpx2.codes.FORBIDDEN:
            return (
                f"The token may not read {release.repo} (403{': ' * bool(said)}{said}): on {TOKEN_PAGE} let it read "
                f"public gated repositories, then run: {_AGAIN}"
            )
    return f"The hub answered {status} {error.response.reason_phrase}; what was fetched is kept. Later run: {_AGAIN}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
