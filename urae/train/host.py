"""What the backward pass keeps, in the host's memory until it is needed, copied beside the work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class SideStream:
    """A CUDA stream that copies beside the one that computes; without CUDA, copies just happen.

    A copy begins after all that was queued to compute before it, so memory that it is put into is
    no longer read. Nothing is recorded on a stream: freed memory would wait for the GPU, which the
    process runs far ahead of, and blocks would pile up on it.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Queue copies beside what is computed from now on."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """Mark the copies queued so far."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let what is computed from now on wait for the copies of a mark."""
        if mark is not None and self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(mark)


@dataclass(eq=False)
class _Kept:
    """A tensor on the host."""

    host: Tensor
    device: torch.device
    group: "_Group"
    coming: Tensor | None = None
    """Its copy on the device, on its way."""


@dataclass(eq=False)
class _Group:
    """What one block keeps."""

    previous: "_Group | None"
    kept: list[_Kept] = field(default_factory=list)
    sources: list[Tensor] = field(default_factory=list)
    """On the device until they are copied."""
    mark: torch.cuda.Event | None = None
    is_coming: bool = False


class HostKeeper:
    """Sends what blocks keep to the host, and brings it back a block ahead, last block first."""

    def __init__(self, device: torch.device) -> None:
        self._side = SideStream(device)
        self._group: _Group | None = None

    def begin_block(self, *, is_first: bool) -> None:
        """Begin with the next block of a forward: the last one's copies are waited for."""
        before = self._group
        if before is not None:
            self._finish_sending(before)
        self._group = _Group(None if is_first else before)

    def send(self, tensor: Tensor) -> _Kept:
        """Copy a tensor of the current block to the host, pinned."""
        assert self._group is not None
        with self._side.copying():
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            host.copy_(tensor, non_blocking=True)
        self._group.sources.append(tensor)
        self._group.mark = self._side.mark()
        kept = _Kept(host, tensor.device, self._group)
        self._group.kept.append(kept)
        return kept

    def bring(self, kept: _Kept) -> Tensor:
        """Give a tensor on its device, and start the copies of the block that comes next."""
        group = kept.group
        self._start(group)
        self._side.wait(group.mark)
        if group.previous is not None:
            self._start(group.previous)
            group.previous = None
        assert kept.coming is not None
        tensor, kept.coming = kept.coming, None
        group.kept.remove(kept)
        return tensor

    def _start(self, group: _Group) -> None:
        if group.is_coming:
            return
        group.is_coming = True
        self._finish_sending(group)
        with self._side.copying():
            for kept in group.kept:
                kept.coming = kept.host.to(kept.device, non_blocking=True, copy=True)
        group.mark = self._side.mark()

    def _finish_sending(self, group: _Group) -> None:
        """Give the memory of what was sent free: what is computed next waits for the copies."""
        if group.sources:
            self._side.wait(group.mark)
            group.sources.clear()


def keep_outputs(
    keeper: HostKeeper, operations: set[Any]
) -> Callable[[], tuple["_Outputs", "_Outputs"]]:
    """Make the contexts of a checkpoint that keeps some operations' outputs on the host.

    torch's own selective checkpoint keeps them on the device, out of reach of saved-tensor hooks.

    Args:
        keeper: Keeps them.
        operations: Those that are not computed twice.
    """

    def build() -> tuple[_Outputs, _Outputs]:
        kept: list[Any] = []
        forward, again = (
            _Outputs(keeper, operations, kept, again=again) for again in (False, True)
        )
        return forward, again

    return build


class _Outputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sends outputs to the host in the forward, brings them back in the same order after it."""

    supports_higher_order_operators = True

    def __init__(
        self, keeper: HostKeeper, operations: set[Any], kept: list[Any], *, again: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keeper, self.operations, self.kept, self.again = keeper, operations, kept, again

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let what is compiled inside of the checkpoint be compiled; it is recomputed whole."""
        return True

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in self.operations:
            return function(*args, **(kwargs or {}))
        if self.again:
            return tree_map_only(_Kept, self.keeper.bring, self.kept.pop(0))
        output = function(*args, **(kwargs or {}))
        self.kept.append(tree_map_only(Tensor, self._send, output))
        return output

    def _send(self, tensor: Tensor) -> Any:
        return self.keeper.send(tensor) if tensor.is_floating_point() else tensor
