"""A folder of shards, here or anywhere that fsspec reaches: byte ranges of its files, checked."""

import logging
import time
import zlib
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from urae.features.byte_cache import ByteCache

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

WAITS = (1.0, 4.0, 16.0)
"""Seconds before each further attempt to read from afar."""

MAX_SECONDS = 120.0
"""How long an attempt may take: a server can take a request and never answer. All four are over
before the other processes of a run, which wait for this one, give up."""

_GONE = (404, 410)  # what HTTP says of a file that is not there


class ShardFolder:
    """Reads files of one folder; what comes from afar is cached and tried more than once."""

    def __init__(self, url: str, cache: ByteCache) -> None:
        """Find the file system that a URL belongs to; nothing is read yet.

        Args:
            url: A local path, or a URL that fsspec knows: `s3://bucket/path`, `hf://...`.
            cache: Keeps what does not lie on this host's file system.

        Raises:
            ImportError: If a package is missing that reads such URLs.
            ValueError: If there is no such kind of URL, or it has a password in it.
        """
        if urlsplit(url).password is not None:
            raise ValueError(
                f"data {_without_user(url)} has a password in its URL, which would end up in the "
                "run's files; give it to fsspec through its settings or the environment"
            )
        try:
            self._files, self._root = url_to_fs(url)
        except ImportError as error:
            raise ImportError(
                f"data {url} needs a package that is missing ({error}); for s3:// and https:// "
                "pip install s3fs, or in a clone pip install -e '.[remote]'"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"data {url} is not a kind of URL that fsspec knows ({error}); give a folder, or "
                "a URL such as s3://bucket/path, hf://datasets/owner/name, https://host/path"
            ) from error
        self.url = url.rstrip("/")
        self._is_local = isinstance(self._files, LocalFileSystem)
        self._cache = cache

    def read(self, name: str) -> bytes:
        """Read a file whole, without a checksum and always from its place.

        Raises:
            FileNotFoundError: If it is not there.
            ConnectionError: If it cannot be read.
        """
        return self._attempt(lambda: self._cat(name), f"{self.url}/{name}")

    def read_range(self, name: str, offset: int, num_bytes: int, crc32: int, what: str) -> bytes:
        """Read bytes of a file, and check that they are those that were packed.

        Args:
            name: Of the file.
            offset: Of the first byte.
            num_bytes: How many.
            crc32: Their checksum.
            what: Name of what they hold, for errors.

        Raises:
            FileNotFoundError: If the file is gone.
            ConnectionError: If it cannot be read, after a few attempts where it is far away.
            ValueError: If it is too short, or the bytes have changed.
        """
        where = f"{what} in shard {self.url}/{name}"

        def read() -> bytes:
            data = self._cat(name, offset, offset + num_bytes)
            fault = _find_fault(data, num_bytes, crc32)
            if fault is not None:
                raise ValueError(
                    f"{where} cannot be used: {fault}; copy the shard again, or delete it and run "
                    "`urae pack` again"
                )
            return data

        if self._is_local:
            return self._attempt(read, where)
        key = f"{self.url}/{name} {offset} {num_bytes} {crc32}"
        data = self._cache.load(key)
        if data is None or _find_fault(data, num_bytes, crc32) is not None:
            data = self._attempt(read, where)
            self._cache.store(key, data)
        return data

    def find_size(self, name: str) -> int | None:
        """Return a file's size in bytes, None if its server does not tell.

        Raises:
            FileNotFoundError: If it is not there.
            ConnectionError: If it cannot be looked up.
        """
        size = self._attempt(lambda: self._look_up(name).get("size"), f"{self.url}/{name}")
        return None if size is None else int(size)

    def _look_up(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._call("info", self._path(name))
        except FileNotFoundError as error:
            cause = error.__cause__  # over HTTP fsspec says so of every failure
            if "http" not in self._files.protocol or cause is None:
                raise
            if getattr(cause, "status", None) in _GONE:
                raise
            raise cause from None
        return found

    def _cat(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        data: bytes = self._call("cat_file", self._path(name), start=start, end=end)
        return data

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the file system; one that is asynchronous has a limit of time."""
        if not isinstance(self._files, AsyncFileSystem):
            return getattr(self._files, method)(*arguments, **options)
        coroutine, began = getattr(self._files, f"_{method}"), time.monotonic()
        try:
            return sync(self._files.loop, coroutine, *arguments, timeout=MAX_SECONDS, **options)
        except FSTimeoutError as error:
            cause = error.__cause__  # the library's own limit may be shorter, and say of what
            seconds = min(MAX_SECONDS, round(time.monotonic() - began, 1))
            raise TimeoutError(str(cause or "") or f"not finished after {seconds:g} s") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _attempt(self, read: Callable[[], Found], where: str) -> Found:
        waits = () if self._is_local else WAITS
        for wait in (*waits, None):
            try:
                return read()
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{where} is missing; restore the file, or run `urae pack` again"
                ) from error
            except Exception as error:  # each storage library has errors of its own
                if wait is not None and not isinstance(error, PermissionError):
                    logger.warning(
                        "%s cannot be read (%s); trying again in %s s", where, _name(error), wait
                    )
                    time.sleep(wait)
                    continue
                if isinstance(error, ValueError):  # said in full by whoever read
                    raise
                raise ConnectionError(
                    f"{where} cannot be read ({_name(error)}); once it can be, continue with "
                    "--resume"
                ) from error
        raise AssertionError


def _name(error: Exception) -> str:
    """Say what an error is, without all that its parts hold: of HTTP, whole requests."""
    return ": ".join(part for part in (type(error).__name__, str(error)) if part)


def _find_fault(data: bytes, num_bytes: int, crc32: int) -> str | None:
    if len(data) != num_bytes:
        return f"{len(data)} bytes arrived, but {num_bytes} were packed"
    if zlib.crc32(data) != crc32:
        return "its bytes have changed since it was packed"
    return None


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
