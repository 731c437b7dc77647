"""Pieces of far-away files kept on the local disk, up to a size: the least recently used go first.

One file a piece, written beside and renamed, so several processes of a host share the folder.
"""

import hashlib
import logging
import os
from pathlib import Path

from urae.storage import write_shared

logger = logging.getLogger(__name__)

_KEPT_SHARE = 0.9  # of the bound, after making room
_UNCHECKED_SHARE = 0.01  # what a process may add before it looks again; ten of them stay in bounds


class ByteCache:
    """Bytes on disk under keys; troubles are logged and never raised.

    A reader must check what it gets: a disk can damage it.
    """

    def __init__(self, cache_dir: Path, max_bytes: int) -> None:
        """Use a folder, which is created at the first piece.

        Args:
            cache_dir: The folder; everything in it may be removed.
            max_bytes: Most that the folder holds; 0 keeps nothing.
        """
        self.cache_dir = cache_dir
        self.max_bytes = max_bytes
        self._unchecked = max_bytes  # the folder is looked at before the first piece is stored
        self._writable = True  # until a write fails: one warning, not one a piece

    def load(self, key: str) -> bytes | None:
        """Return the bytes stored under `key`, or None; they count as used now."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("cannot use cache file %s (%s); reading it again", path, error)
            return None
        return data

    def store(self, key: str, data: bytes) -> None:
        """Keep bytes under `key`, in place of what has not been used for longest."""
        if not self._writable or len(data) > self.max_bytes * _KEPT_SHARE:
            return
        self._unchecked += len(data)
        try:
            if self._unchecked > self.max_bytes * _UNCHECKED_SHARE:
                self._make_room(len(data))
                self._unchecked = len(data)
            write_shared(self._path(key), data)
        except OSError as error:
            self._writable = False
            logger.warning(
                "cannot write to cache folder %s (%s); features are fetched again each time; set "
                "URAE_CACHE_DIR to a writable folder with room to keep them",
                self.cache_dir,
                error,
            )

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently used files until so many bytes fit well within the bound."""
        found = []
        for path in self.cache_dir.glob("*"):
            try:
                state = path.stat()
            except FileNotFoundError:  # another process makes room too
                continue
            found.append((state.st_mtime_ns, state.st_size, path))
        total = num_bytes + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes * _KEPT_SHARE:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        return self.cache_dir / hashlib.sha256(key.encode()).hexdigest()
