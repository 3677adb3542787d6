"""Paths and URLs through fsspec, in the one place where stores differ.

Credentials and endpoint of S3 come from the environment (AWS_*) as s3fs reads them. A bare pyarrow S3FileSystem
ignores AWS_ENDPOINT_URL and would call the real AWS, so it is not used.
"""

import errno
import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from batch_rerank.errors import ConfigError, InputError, StorageError
from batch_rerank.outside import hide, problem_of, protocol_of, without_users
from batch_rerank.store import disk
from batch_rerank.store.failures import input_errors as input_errors  # where paths are opened they are asked for
from batch_rerank.store.failures import storage_errors as storage_errors
from batch_rerank.store.patience import Patience

_ANSWERED = "_batch_rerank_answered"
"""Attribute of a filesystem whose store has answered this process. fsspec keeps one object for each store and its
options; two objects with other endpoints in the environment are equal, so a set of them would not do."""

STAGE = "_stage-[0-9a-f]{16}"
"""The folder of a stage that no job has named."""

Options = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """A file as a listing shows it. `version` is the etag, or size and mtime where the store has none."""

    path: str
    size: int
    version: str


@dataclass(frozen=True)
class Location:
    """A filesystem with a path on it. Operations on a store, not on a local disk, are repeated with `patience`, which
    a location shares with those that are made from it."""

    fs: fsspec.AbstractFileSystem
    path: str
    patience: Patience = field(default_factory=Patience, compare=False, repr=False)

    def __truediv__(self, name: str) -> "Location":
        return self.at(f"{self.path.rstrip('/')}/{name}")

    def at(self, path: str) -> "Location":
        """Another path on the same filesystem."""
        return Location(self.fs, path, self.patience)

    def __str__(self) -> str:
        return self.path if self.is_local else without_users(str(self.fs.unstrip_protocol(self.path)))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path)

    @property
    def is_local(self) -> bool:
        """Whether this is a disk of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def open(self) -> IO[bytes]:
        """For reading. No cache: pyarrow asks for whole column chunks, each once."""
        if self.is_local:
            file: IO[bytes] = self.fs.open(self.path, "rb")
            return file
        return cast(IO[bytes], _Ranges(self))

    def read_bytes(self) -> bytes:
        """The whole content. Raises FileNotFoundError."""
        # s3fs would ask for the size first, and then for several ranges at once
        options = {"max_concurrency": 1} if self._is_s3 else {}
        content: bytes = self.patiently(lambda: self.fs.cat_file(self.path, **options))
        return content

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes start to stop. Raises FileNotFoundError."""

        def read() -> bytes:
            # keywords: the second position of s3fs's cat_file is a version
            content: bytes = self.fs.cat_file(self.path, start=start, end=stop)
            if len(content) != stop - start:
                raise EOFError(f"bytes {start} to {stop}: {len(content)} arrived")
            return content

        return self.patiently(read)

    def stat(self) -> File:
        """The file as it is now. Raises FileNotFoundError."""
        return _file(_followed(self.fs, self.patiently(lambda: self.fs.info(self.path))))

    def exists(self) -> bool:
        """Whether there is an object or a file. Not fsspec's isfile, which says no when the store fails."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def find(self) -> dict[str, File]:
        """Every file below this directory by its path, in one listing; none where a local directory is absent."""
        options = {} if self._is_s3 else {"on_error": "raise"}  # fsspec leaves out what it cannot list unless told
        try:
            found = self.patiently(lambda: self.fs.find(self.path, detail=True, **options))
        except FileNotFoundError:
            if self.is_local:
                return {}
            raise
        return {str(path): _file(info) for path, info in sorted(found.items())}

    def write_bytes(self, data: bytes) -> None:
        """Create or replace. On a local disk readers see the old or the new content, never a half."""
        if not self.is_local:
            self.patiently(lambda: self.fs.pipe_file(self.path, data))
            return
        disk.place(os.replace, self.path, data)

    @contextmanager
    def writer(self) -> Iterator[IO[bytes]]:
        """To create or replace a file too large to be held. Readers see the old or the new content, never a half."""
        if not self.is_local:
            with self.fs.open(self.path, "wb") as file:  # S3: a multipart upload, there when it is complete
                yield file
            return
        with disk.writer(self.path) as file:
            yield file

    def create_exclusive(self, data: bytes) -> bool:
        """Create with this content, all or nothing; False where it exists already with another content.

        S3 and Azure: one PUT with If-None-Match; Google: ifGenerationMatch=0. Local: a synced temporary file and a
        hard link, which fails if the name is taken. A reply may get lost: the PUT happened, and its repetition is
        refused. So the content is what decides, and content that must have one writer names its writer.
        """
        if self.is_local:
            return disk.link_exclusive(self.path, data) or self.read_bytes() == data
        return self.patiently(self._put_new, data) or self.read_bytes() == data

    def _put_new(self, data: bytes) -> bool:
        # s3fs would upload more than 100 MB in pieces, whose end is not conditional everywhere
        one = {"chunksize": len(data) + 1} if self._is_s3 else {}
        try:
            self.fs.pipe_file(self.path, data, mode="create", **one)
        except FileExistsError:
            return False
        except (OSError, ValueError) as error:
            # radosgw's 412 arrives as OSError EINVAL
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EIO, None):
                raise
            if not self.fs.exists(self.path):
                raise
            return False
        return True

    def keeps_first(self, data: bytes) -> bool:
        """Whether the store refuses to create what exists. `data` must be the content that is there."""
        return self.is_local or not self.patiently(self._put_new, data)

    def remove(self) -> None:
        """Delete one object or file; nothing where it is gone already."""
        with suppress(FileNotFoundError):
            self.patiently(lambda: self.fs.rm_file(self.path))

    def remove_seen(self, seen: File) -> bool:
        """Delete what a listing or `stat` showed; False where there is another by now, which stays.

        It may be any time since, and another process may have replaced it. S3: one DELETE with If-Match, so an object
        is another where its content is. Local: the file is moved aside, looked at, and moved back where it is another;
        size and mtime tell. Other stores, and such as pass over the condition: a look and a removal, with a gap.
        """
        try:
            if not _same(self.stat(), seen):
                return False
            if self.is_local:
                return disk.remove_if(self.path, lambda aside: _same(_file(self.fs.info(aside)), seen))
            if self._is_s3:
                return self.patiently(self._delete_matching, seen)
        except FileNotFoundError:
            return True
        self.remove()
        return True

    def take_back(self, data: bytes) -> None:
        """Delete what we wrote, unless another has taken its place since."""
        with suppress(FileNotFoundError):
            seen = self.stat()
            if self.read_bytes() == data:
                self.remove_seen(seen)

    def _delete_matching(self, seen: File) -> bool:
        bucket, key, _ = self.fs.split_path(self.path)
        try:
            self.fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=f'"{seen.version}"')
        except OSError as error:
            if error.errno == errno.ENOSYS:  # a store that knows no condition, and says so
                self.fs.rm_file(self.path)
            elif error.errno != errno.EINVAL:  # 412: another object
                raise
            return error.errno == errno.ENOSYS
        return True

    def patiently(self, operation: Callable[..., T], *args: Any) -> T:
        """Do something on this store that may be repeated."""
        if self.is_local:
            return operation(*args)
        if getattr(self.fs, _ANSWERED, False):  # to another location: what fails now is away, and no wrong endpoint
            self.patience.reached = True
        result = self.patience.keep(self, lambda: operation(*args))
        setattr(self.fs, _ANSWERED, True)
        return result

    @property
    def _is_s3(self) -> bool:
        return "s3" in self.fs.protocol


class _Ranges(io.RawIOBase):
    """A remote object as a file: every read is one request for one range, repeated as long as it may pass."""

    def __init__(self, location: Location) -> None:
        self._location, self._size, self._position = location, location.stat().size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._position + len(buffer))
        if stop <= self._position:
            return 0
        with storage_errors(self._location):
            data = self._location.read_range(self._position, stop)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)


def locate(url: str, options: Options | None = None, reached: bool = False) -> Location:
    """The location of a path or URL. `reached`: the job's driver has had answers from there, so an outage is waited
    for. Raises StorageError for a place that no job may have, and ConfigError for wrong options; their values are
    hidden from here on."""
    if problem := problem_of(url):
        raise StorageError(problem)
    protocol, options = protocol_of(url), options or {}
    hide(options)
    # without their listing caches libraries see what other processes wrote
    fixed = {} if protocol in ("file", "local") else {"use_listings_cache": False}
    try:
        kind = fsspec.get_filesystem_class(protocol)
        # not url_to_fs, which takes a name with "::" in it for a chain of places
        path = kind._strip_protocol(url)
        fs = fsspec.filesystem(protocol, **{**kind._get_kwargs_from_urls(url), **fixed, **options})
        if options and protocol in ("s3", "s3a"):
            fs.connect()  # s3fs looks at its options when it first needs them; this asks nothing of the store
    except Exception as error:  # any: libraries raise what they like, and none may show a value
        if not options:
            raise StorageError(f"{url}: cannot open this kind of location: {error}") from None
        named = [name for name in options if repr(name) in str(error)]
        about = f", e.g. {named[0]!r}" if named else ""
        raise ConfigError(
            f"{url}: cannot be opened with its storage_options {sorted(map(str, options))}{about} "
            f"({type(error).__name__}; values are not shown); correct them"
        ) from None
    return Location(fs, path, Patience(reached))


def list_files(pattern: Location) -> list[File]:
    """Files that match a glob, or the `*.parquet` files of a directory, by path; links to files are files. A wildcard
    matches no stage: those lie beside the sources they were made of. Raises InputError for a link to nothing."""
    fs, path = pattern.fs, pattern.path
    if not has_magic(path):
        try:
            info = pattern.patiently(lambda: fs.info(path))
        except FileNotFoundError:
            return []
        if info["type"] != "directory":
            return [_file(_followed(fs, info))]
        path = path.rstrip("/") + "/*.parquet"
    # unless told, fsspec leaves out directories that it fails to list; a "**" on S3 is one listing, which just fails
    options = {} if "**" in path else {"on_error": "raise"}
    # for a name that begins before its wildcard (part-*) s3fs lists by prefix, and then knows no on_error
    start = path.rfind("/", 0, min(path.find(sign) for sign in "*?[" if sign in path)) + 1
    open_start = path if path[start] in "*?[" else f"{path[:start]}?{path[start + 1 :]}"
    try:
        found = pattern.patiently(lambda: fs.glob(open_start, detail=True, **options))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise InputError(f"{pattern}: not a glob ({error}); write * for a part of a name, ** for any folders") from None
    files = [info for name, info in sorted(found.items()) if open_start == path or name[start] == path[start]]
    files = [info for info in files if not re.search(rf"(?:^|/){STAGE}/", info["name"][start:])]
    followed = [_followed(fs, info) for info in files]
    return [_file(info) for info in followed if info["type"] == "file"]


def _followed(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> dict[str, Any]:
    """What is said of a file, or of the one that a link on a disk leads to, under the link's name."""
    if not info.get("islink"):
        return info
    target = os.path.realpath(info["name"])
    if not os.path.exists(target):
        raise InputError(f"{info['name']}: a link to {target}, which is not there; remove it, or mend it")
    return {**fs.info(target), "name": info["name"]}


def identity_of(location: Location, file: File) -> str:
    """The same of a file under all of its names: `..` and links on a disk are followed."""
    return os.path.realpath(file.path) if location.is_local else file.path


def _file(info: dict[str, Any]) -> File:
    etag = str(info.get("ETag") or info.get("etag") or info.get("blob_id") or "").strip('"')  # blob_id: the hub's
    version = etag or f"mtime:{info.get('mtime', info.get('LastModified', ''))}"
    return File(path=str(info["name"]), size=int(info["size"] or 0), version=version)


def _same(one: File, other: File) -> bool:
    return (one.size, one.version) == (other.size, other.version)


def has_magic(path: str) -> bool:
    """Whether a path is a glob."""
    return any(sign in path for sign in "*?[")
