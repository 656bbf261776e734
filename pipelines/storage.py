"""Files, wherever they are: a local path or any fsspec URI, given as a string.

What is written appears under its final name whole or not at all: locally through a temporary file, fsync and rename, on
an object store as one upload. Listings on an object store are never cached, since other processes write there too.
"""

import contextlib
import errno
import glob as local_glob
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from pipelines.errors import UserError

_TEMPORARY = re.compile(r"^\.armd-.*\.tmp$")
_SECRET_VALUE = re.compile(
    r"""([?&;#](?:[^=&\s"']*(?:signature|credential|secret|token|passw|key)[^=&\s"']*|sig|pwd)=)[^&\s"'\\]+""",
    re.IGNORECASE,
)  # of a URI's query: X-Amz-Signature=.., sig=.., access_token=..
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file as a listing shows it."""

    uri: str
    """Absolute path or full URI."""
    name: str
    """Path below what was asked for: the folder, or a pattern's last folder without a wildcard; a file's own name."""
    size: int
    """Bytes."""
    version: str
    """Changes when the content does: the modification time in ns, or what the object store calls the version (ETag)."""


def is_local(uri: str) -> bool:
    """True for a path of this machine, `file://` included."""
    return "://" not in uri or uri.startswith("file://")


def check_place(uri: str, name: str) -> None:
    """Refuse what names no place at all, an empty string or a scheme alone; touches nothing.

    Raises:
        ValueError: naming the setting `name` and the value.
    """
    rest = uri.rpartition("://")[2].strip()
    if not (rest if is_local(uri) else rest.strip("/")):
        raise ValueError(f"{name} must be a folder, or a URI with a bucket such as s3://bucket/runs, not {uri!r}")


def absolute(uri: str) -> str:
    """A local path made absolute, `~` expanded; an object store's URI without a slash at its end."""
    if is_local(uri):
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    return uri.rstrip("/")


def join(base: str, *parts: str) -> str:
    """`parts` below `base`, which is made absolute."""
    base = absolute(base)
    return os.path.join(base, *parts) if is_local(base) else "/".join([base, *parts])


def redacted(text: str) -> str:
    """`text` for messages, without credentials.

    Left out are user:password@ in a URI, the values of its query that are named like a signature, key, token or
    password, and the environment's AWS secrets.
    """
    text = re.sub(r"(://)[^/@\s]+@", r"\1", text)
    text = _SECRET_VALUE.sub(r"\1***", text)
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "***")
    return text


def exists(uri: str) -> bool:
    """True where `uri` is a file or a folder (on an object store: a prefix that holds something)."""
    if is_local(uri):
        return os.path.exists(absolute(uri))
    filesystem, path = _remote(uri)
    with _named("looking for", uri):
        return bool(filesystem.exists(path))


def isdir(uri: str) -> bool:
    """True where `uri` is a folder (on an object store: a prefix that holds something)."""
    if is_local(uri):
        return os.path.isdir(absolute(uri))
    filesystem, path = _remote(uri)
    with _named("looking for", uri):
        return bool(filesystem.isdir(path))


def list_names(folder: str) -> list[str]:
    """Sorted names of the files and folders in `folder`, [] where it is missing; unfinished writes are not shown."""
    if is_local(folder):
        try:
            names = os.listdir(absolute(folder))
        except (FileNotFoundError, NotADirectoryError):
            names = []
    else:
        filesystem, path = _remote(folder)
        found: list[str] = []
        with contextlib.suppress(FileNotFoundError), _named("listing", folder):
            found = [name.rstrip("/") for name in filesystem.ls(path, detail=False)]
        names = [name.rsplit("/", 1)[-1] for name in found if name != path.rstrip("/")]
    return sorted(name for name in names if not _TEMPORARY.match(name))


def find(uri: str) -> list[Entry]:
    """The files below the folder `uri` at any depth, `uri` itself where it is a file, sorted by name.

    Names that begin with a dot are left out, as a shell would. [] where nothing is there.

    Raises:
        OSError: a local folder cannot be listed.
        UserError: the file system of `uri` cannot be used.
    """
    if is_local(uri):
        path = absolute(uri)
        if os.path.isfile(path):
            return _local_entries([path], os.path.dirname(path))
        return _local_entries(sorted(_walk(path)), path) if os.path.isdir(path) else []
    filesystem, path = _remote(uri)
    found = filesystem.find(path, detail=True)
    hidden = {name for name in found if name != path and _is_hidden(name.removeprefix(path))}
    base = path.rpartition("/")[0] if path in found else path
    return [_remote_entry(filesystem, found[name], base) for name in sorted(found) if name not in hidden]


def glob(pattern: str) -> list[Entry]:
    """The files that match `pattern` (`*`, `?`, `[..]`, `**` for any depth), sorted by name.

    Raises:
        OSError: a local folder that may hold some cannot be listed.
        UserError: the file system of `pattern` cannot be used.
    """
    if is_local(pattern):
        path = absolute(pattern)
        _check_listable(path)
        matches = sorted(local_glob.glob(path, recursive=True))
        return _local_entries([match for match in matches if os.path.isfile(match)], _fixed_folder(path))
    filesystem, path = _remote(pattern)
    found = filesystem.glob(path, detail=True)
    fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
    names = [name for name in sorted(found) if found[name]["type"] == "file"]
    if not _is_hidden(path.removeprefix(fixed)):
        names = [name for name in names if not _is_hidden(name.removeprefix(fixed))]
    return [_remote_entry(filesystem, found[name], _fixed_folder(path)) for name in names]


def make_dir(uri: str) -> None:
    """Make the folder and those above it; nothing to do on an object store."""
    if is_local(uri):
        os.makedirs(absolute(uri), exist_ok=True)


def remove_tree(uri: str) -> None:
    """Remove the folder or file and all below it; nothing happens where it is missing."""
    if not is_local(uri):
        filesystem, path = _remote(uri)
        with contextlib.suppress(FileNotFoundError), _named("removing", uri):
            filesystem.rm(path, recursive=True)
        return
    path = absolute(uri)
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def open_read(uri: str) -> IO[bytes]:
    """Open for reading bytes, seekable; the caller closes it."""
    if is_local(uri):
        return open(absolute(uri), "rb")
    filesystem, path = _remote(uri)
    with _named("reading", uri):
        file: IO[bytes] = filesystem.open(path, "rb")
        return file


def read_bytes(uri: str) -> bytes:
    """The whole content.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_local(uri):
        return Path(absolute(uri)).read_bytes()
    filesystem, path = _remote(uri)
    with _named("reading", uri):
        return bytes(filesystem.cat_file(path))


def read_text(uri: str) -> str:
    """The whole content as UTF-8."""
    return read_bytes(uri).decode("utf-8")


def read_json(uri: str) -> Any:
    """The content as JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON in UTF-8.
    """
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes) -> None:
    """Write the file whole or not at all, with the folders above it."""
    if not is_local(uri):
        filesystem, path = _remote(uri)
        with _named("writing", uri):
            filesystem.pipe_file(path, data)
        return
    with _replacing(absolute(uri)) as temporary, open(temporary, "wb") as file:
        file.write(data)
        _flush(file)


def write_text(uri: str, text: str) -> None:
    """Write the text as UTF-8, whole or not at all."""
    write_bytes(uri, text.encode("utf-8"))


def write_json(uri: str, value: Any) -> None:
    """Write the value as JSON with sorted keys, whole or not at all.

    Raises:
        ValueError: a number is not finite.
    """
    write_text(uri, json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n")


def put_file(local_path: str, uri: str) -> None:
    """Move a finished local file to `uri`, where it appears whole or not at all; `local_path` is gone afterwards."""
    if not is_local(uri):
        filesystem, path = _remote(uri)
        with _named("writing", uri):
            filesystem.put_file(local_path, path)
        os.unlink(local_path)
        return
    target = absolute(uri)
    make_dir(os.path.dirname(target))
    _sync(local_path)
    try:
        os.replace(local_path, target)
        _sync(os.path.dirname(target))
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    with _replacing(target) as temporary, open(local_path, "rb") as source, open(temporary, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        _flush(file)
    os.unlink(local_path)


@contextlib.contextmanager
def scratch_file(folder: str) -> Iterator[str]:
    """A name for a temporary local file, from which `put_file` into `folder` is a rename where that is possible.

    The file is removed at the end of the block, unless it was moved away.
    """
    if is_local(folder):
        make_dir(folder)
    path = os.path.join(absolute(folder) if is_local(folder) else tempfile.gettempdir(), _temporary_name())
    try:
        yield path
    finally:
        Path(path).unlink(missing_ok=True)


def remove_unfinished(folder: str, older_than: float = 0.0) -> None:
    """Remove what killed processes left half-written in `folder`.

    Args:
        folder: where; nothing happens on an object store.
        older_than: seconds since the last write; at 0 nobody else may be writing there.
    """
    if is_local(folder) and os.path.isdir(absolute(folder)):
        for name in os.listdir(absolute(folder)):
            path = Path(absolute(folder), name)
            with contextlib.suppress(FileNotFoundError):
                if _TEMPORARY.match(name) and (not older_than or time.time() - path.stat().st_mtime > older_than):
                    path.unlink()


def fetch_file(uri: str, cache_dir: str) -> str:
    """The path of a local file with the content of `uri`: itself where it is local, else a copy below `cache_dir`.

    The copy's name carries the object's version, so a changed object is fetched anew. Safe to call from several
    processes at once.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if is_local(uri):
        path = absolute(uri)
        if not os.path.isfile(path):
            raise FileNotFoundError(path)
        return path
    filesystem, path = _remote(uri)
    entry = _remote_entry(filesystem, filesystem.info(path), "")
    key = sha256_bytes(f"{entry.uri} {entry.size} {entry.version}".encode())[:16]
    target = os.path.join(absolute(cache_dir), f"{key}-{os.path.basename(path)}")
    if not os.path.isfile(target):
        with _replacing(target) as temporary:
            filesystem.get_file(path, temporary)
            _sync(temporary)
    return target


def download(uri: str, path: str) -> None:
    """Copy a file of an object store to the local `path`, whose folder exists.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read; names it.
    """
    filesystem, remote = _remote(uri)
    with _named("reading", uri):
        filesystem.get_file(remote, path)


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data`, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(uri: str) -> str:
    """SHA-256 of a file's content, hexadecimal; a remote file is read through, not kept."""
    digest = hashlib.sha256()
    with open_read(uri) as file, contextlib.nullcontext() if is_local(uri) else _named("reading", uri):
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(uri: str) -> None:
    """Make the folder `uri` and prove that a file can be written there.

    Raises:
        UserError: it cannot; names the folder and the reason.
    """
    probe = join(uri, _temporary_name())
    try:
        write_bytes(probe, b"armd")
        remove_tree(probe)
    except UserError:
        raise
    except Exception as error:  # every object store has exceptions of its own
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            redacted(f"cannot write to {absolute(uri)}: {reason}"),
            "choose another --root, or give this user the right to write there",
        ) from None


def _remote(uri: str) -> tuple[Any, str]:
    """The fsspec file system of `uri` and the path in it."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            redacted(f"cannot use {uri}: {reason}"),
            "check the URI's scheme; s3:// works, others need their fsspec package",
        ) from None
    return filesystem, path


@contextlib.contextmanager
def _named(doing: str, uri: str) -> Iterator[None]:
    """An object store's failure as an error that names the place; every store has exceptions of its own.

    Raises:
        FileNotFoundError: as the store says.
        UserError: for anything else.
    """
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            redacted(f"{doing} {uri} failed: {reason}"),
            "check the credentials and the store; then run the same command again: what is done stays done",
        ) from None


def _fixed_folder(pattern: str) -> str:
    """The part of `pattern` before the first component with a wildcard."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]


def _remote_entry(filesystem: Any, info: dict[str, Any], base: str) -> Entry:
    version = next(
        (info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if key in info), ""
    )
    return Entry(
        uri=filesystem.unstrip_protocol(info["name"]),
        name=info["name"].removeprefix(base).lstrip("/"),
        size=int(info["size"] or 0),
        version=str(version),
    )


def _local_entries(paths: list[str], base: str) -> list[Entry]:
    stats = [(path, os.stat(path)) for path in paths]
    return [
        Entry(
            uri=path,
            name=path.removeprefix(base).lstrip("/"),
            size=stat.st_size,
            version=str(stat.st_mtime_ns),
        )
        for path, stat in stats
    ]


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, onerror=_raise):  # by default it leaves out what it cannot list
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> NoReturn:
    raise error


def _check_listable(pattern: str) -> None:
    """List the folders that `pattern` looks into: glob leaves out those that it cannot list."""
    folders = pattern
    while local_glob.has_magic(folders):
        folders = os.path.dirname(folders)
        for folder in filter(os.path.isdir, local_glob.glob(folders, recursive=True)):
            os.scandir(folder).close()


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


@contextlib.contextmanager
def _replacing(target: str) -> Iterator[str]:
    """A temporary name beside `target`; the file written there takes its place when the block ends without an error."""
    folder = os.path.dirname(target)
    make_dir(folder)
    temporary = os.path.join(folder, _temporary_name())
    try:
        yield temporary
        os.replace(temporary, target)
        _sync(folder)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _temporary_name() -> str:
    return f".armd-{os.getpid()}-{secrets.token_hex(6)}.tmp"


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
