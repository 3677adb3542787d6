"""Paths and URLs through fsspec, in the one place where stores differ.

Credentials and endpoint of S3 come from the environment (AWS_*) as s3fs reads them. A bare pyarrow S3FileSystem
ignores AWS_ENDPOINT_URL and would call the real AWS, so it is not used.
"""

import errno
import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from batch_rerank.errors import BatchRerankError, InputError, StorageError

Options = dict[str, Any]


@dataclass(frozen=True)
class Location:
    """A filesystem with a path on it."""

    fs: fsspec.AbstractFileSystem
    path: str

    def __truediv__(self, name: str) -> "Location":
        return Location(self.fs, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

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
        file: IO[bytes] = self.fs.open(self.path, "rb", **({} if self.is_local else {"cache_type": "none"}))
        return file

    def read_bytes(self) -> bytes:
        """The whole content. Raises FileNotFoundError."""
        content: bytes = self.fs.cat_file(self.path)
        return content

    def exists(self) -> bool:
        """Whether there is an object or a file."""
        return bool(self.fs.isfile(self.path))

    def write_bytes(self, data: bytes) -> None:
        """Create or replace. On a local disk readers see the old or the new content, never a half."""
        if not self.is_local:
            self.fs.pipe_file(self.path, data)
            return
        temporary = _write_temporary(self.path, data)
        os.replace(temporary, self.path)
        _sync_directory(os.path.dirname(self.path))

    def create_exclusive(self, data: bytes) -> bool:
        """Create with this content, all or nothing; False where it exists already.

        S3: one PUT with If-None-Match. Local: a synced temporary file and a hard link, which fails if the name is
        taken. Other stores: a check and a write, so two writers at once are not kept apart there.
        """
        if self.is_local:
            return _link_exclusive(self.path, data)
        try:
            self.fs.pipe_file(self.path, data, mode="create")
        except FileExistsError:
            return False
        except (OSError, ValueError) as error:
            # radosgw's 412 arrives as OSError EINVAL; a lost reply to a successful PUT arrives as a 412 to its retry,
            # and the caller then finds its own content
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EIO, None):
                raise
            if not self.exists():
                raise
            return False
        return True

    def remove(self) -> None:
        """Delete one object or file."""
        self.fs.rm_file(self.path)


def locate(url: str, options: Options | None = None) -> Location:
    """The location of a path or URL. Raises StorageError for an unknown protocol or wrong options."""
    try:
        protocol = url.split("://")[0] if "://" in url else "file"
        # without its listing cache s3fs sees what other processes wrote
        fixed = {"use_listings_cache": False} if protocol in ("s3", "s3a") else {}
        fs, path = fsspec.core.url_to_fs(url, **{**fixed, **(options or {})})
    except (ImportError, ValueError, TypeError) as error:
        raise StorageError(f"{url}: cannot open this kind of location: {error}") from None
    return Location(fs, path)


@dataclass(frozen=True)
class File:
    """A file as a listing shows it. `version` is the etag, or size and mtime where the store has none."""

    path: str
    size: int
    version: str


def list_files(pattern: Location) -> list[File]:
    """Files that match a glob, or the `*.parquet` files of a directory, by path."""
    fs, path = pattern.fs, pattern.path
    if not _has_magic(path) and fs.isdir(path):
        path = path.rstrip("/") + "/*.parquet"
    found = fs.glob(path, detail=True) if _has_magic(path) else {path: fs.info(path)} if fs.exists(path) else {}
    return [_file(info) for _, info in sorted(found.items()) if info["type"] == "file"]


def stat(location: Location) -> File:
    """The file as it is now. Raises FileNotFoundError."""
    return _file(location.fs.info(location.path))


def _file(info: dict[str, Any]) -> File:
    etag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    version = etag or f"mtime:{info.get('mtime', info.get('LastModified', ''))}"
    return File(path=str(info["name"]), size=int(info["size"] or 0), version=version)


def _has_magic(path: str) -> bool:
    return any(sign in path for sign in "*?[")


@contextmanager
def storage_errors(where: object, kind: type[BatchRerankError] = StorageError) -> Iterator[None]:
    """Turn what stores raise (no credentials, no such bucket, disk full, …) into one of our errors with the reason."""
    try:
        yield
    except BatchRerankError:
        raise
    except FileNotFoundError:
        raise kind(f"{where}: not found; check the path, and for S3 the bucket and AWS_ENDPOINT_URL") from None
    except PermissionError as error:
        reason = str(error) or "permission denied"
        raise kind(f"{where}: not permitted ({reason}); check the rights and the credentials") from None
    except OSError as error:
        raise kind(f"{where}: storage failed: {error.strerror or error}") from error
    except Exception as error:
        # botocore's errors (NoCredentialsError, EndpointConnectionError, ClientError) share no base with OSError
        if not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec")):
            raise
        raise kind(f"{where}: storage failed: {error}") from error


@contextmanager
def input_errors(where: object) -> Iterator[None]:
    """The same for the input: a missing shard is an input error."""
    with storage_errors(where, InputError):
        yield


def _link_exclusive(path: str, data: bytes) -> bool:
    if os.path.exists(path):
        return False
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    _sync_directory(os.path.dirname(path))
    return True


def _write_temporary(path: str, data: bytes) -> str:
    """A synced file beside `path`, hidden from globs, on the same disk so that it can be linked."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
