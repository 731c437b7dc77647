"""Claims by which several processes, on one machine or more, share the work on a folder."""

import errno
import fcntl
import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of some network file systems


class Claims:
    """Exclusive claims on names: locks on single bytes of one file.

    The kernel gives up a process's locks when it ends, however it ends, so a killed run leaves
    nothing to clean up. A name's byte is a hash of it; two names on one byte only wait for each
    other. The locks belong to a process: threads of one process do not exclude each other. Where
    the file system has no locks a warning says so, and every claim is granted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has_locks = True

    def __enter__(self) -> "Claims":
        self._path.parent.mkdir(exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if self._lock("", wait=False):
                self._unlock("")
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._has_locks = False
            logger.warning(
                f"{self._path.parent} cannot be locked ({error.strerror}); let no other process "
                "work on it"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    @contextmanager
    def claim(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Claim a name for the length of a `with` block.

        Args:
            name: Whatever stands for the work.
            wait: Wait while another process has it, rather than give up.

        Yields:
            Whether the claim was granted.
        """
        if not self._lock(name, wait=wait):
            yield False
            return
        try:
            yield True
        finally:
            self._unlock(name)

    def share(
        self,
        names: Sequence[str],
        advance: Callable[[int], None],
        *,
        ahead: Callable[[int], object] | None = None,
    ) -> Iterator[int]:
        """Yield the number of each name while this process has the claim on it.

        First those that no other process is busy with, then the others as they are let go: whoever
        had them may have been killed.

        Args:
            names: What the processes share; their lists may differ.
            advance: Told how many are done, from zero on.
            ahead: Told the number of each name as soon as it is claimed. With it the next free name
                is claimed before the one at hand is yielded, so that its work can begin. Nothing
                else is claimed while this waits, or two processes could wait for each other.
        """
        done = 0
        advance(done)
        busy: list[int] = []
        for number in self._claim_free(names, busy, ahead):
            yield number
            done += 1
            advance(done)
        for number in busy:
            with self.claim(names[number], wait=True):
                if ahead is not None:
                    ahead(number)
                yield number
            done += 1
            advance(done)

    def _claim_free(
        self, names: Sequence[str], busy: list[int], ahead: Callable[[int], object] | None
    ) -> Iterator[int]:
        """Yield the numbers of the names that are free, and put the others' into `busy`."""
        most = 1 if ahead is None else 2
        claimed: deque[int] = deque()  # the first is at hand
        try:
            for number, name in enumerate(names):
                if not self._lock(name, wait=False):
                    busy.append(number)
                    continue
                claimed.append(number)
                if ahead is not None:
                    ahead(number)
                if len(claimed) == most:
                    yield claimed[0]
                    self._unlock(names[claimed.popleft()])
            if claimed:
                yield claimed[0]
        finally:
            for number in claimed:
                self._unlock(names[number])

    def _lock(self, name: str, *, wait: bool) -> bool:
        """Lock a name's byte, and return whether it was granted."""
        if not self._has_locks:
            return True
        command = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._file, command, 1, _find_byte(name))
        except (BlockingIOError, PermissionError):  # POSIX lets a system choose either
            return False
        return True

    def _unlock(self, name: str) -> None:
        if self._has_locks:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _find_byte(name))


def _find_byte(name: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7])
