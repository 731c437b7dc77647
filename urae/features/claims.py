"""Claims by which several processes, on one machine or more, share the work on a folder."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Claims:
    """Exclusive claims on names: locks on single bytes of one file.

    The kernel gives up a process's locks when it ends, however it ends, so a killed run leaves
    nothing to clean up. A name's byte is a hash of it; two names on one byte only wait for each
    other. The locks belong to a process: threads of one process do not exclude each other.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "Claims":
        self._path.parent.mkdir(exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
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
        byte = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7])
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):  # POSIX lets a system choose either
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)

    def share(self, names: Sequence[str], advance: Callable[[int], None]) -> Iterator[int]:
        """Yield the number of each name while this process has the claim on it.

        First those that no other process is busy with, then the others as they are let go: whoever
        had them may have been killed.

        Args:
            names: What the processes share; their lists may differ.
            advance: Told how many are done, from zero on.
        """
        left: Iterable[int] = range(len(names))
        done = 0
        advance(done)
        for wait in (False, True):
            busy = []
            for number in left:
                with self.claim(names[number], wait=wait) as granted:
                    if not granted:
                        busy.append(number)
                        continue
                    yield number
                done += 1
                advance(done)
            left = busy
