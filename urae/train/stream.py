"""Frozen weights on the host, each block's brought to the device a block ahead of its use.

diffusers' group offloading does so for inference: it brings the next block in the order of the
forward, and puts weights back after a forward that ends. A backward pass that recomputes blocks
goes through them from last to first, and leaves each forward where nothing more is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from urae.generate.speed import list_blocks
from urae.train.host import SideStream

_HOOK = "urae_streamed_weights"


def stream_weights(transformer: FluxTransformer2DModel, device: torch.device) -> "WeightStream":
    """Keep the frozen weights of the blocks on the host, pinned; all else goes to the device.

    Args:
        transformer: On the CPU, with its adapters; the blocks are compiled before, if at all.
        device: Where it trains.

    Returns:
        What brings them: at most two blocks' weights are on the device, beside those that a
        backward pass still needs.
    """
    blocks = list_blocks(transformer)
    stream = WeightStream(blocks, device)
    for index, block in enumerate(blocks):
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(_Streamed(stream, index), _HOOK)
    in_blocks = {id(tensor) for block in blocks for tensor in _tensors(block)}
    for tensor in _tensors(transformer):
        if id(tensor) not in in_blocks:
            tensor.data = tensor.data.to(device)
    return stream


class WeightStream:
    """The weights of a row of blocks, which are run through forth and back."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._side = SideStream(device)
        self._frozen = [[t for t in _tensors(block) if not t.requires_grad] for block in blocks]
        self._here: dict[int, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        self._last, self._direction = -1, 1
        for block in blocks:
            for tensor in _tensors(block):
                if tensor.requires_grad:
                    tensor.data = tensor.data.to(device)
                elif device.type == "cuda":
                    tensor.data = tensor.data.pin_memory()
        self._host = [[tensor.data for tensor in tensors] for tensors in self._frozen]

    @property
    def num_on_device(self) -> int:
        """Blocks whose weights are on the device, or on their way."""
        return len(self._here)

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Put a block's weights in place on the device, and have the next block's brought."""
        self._turn(index)
        after = index + self._direction
        wanted = {index, after} if 0 <= after < len(self._frozen) else {index}
        for other in self._here.keys() - wanted:
            del self._here[other]
        for each in sorted(wanted, key=lambda number: number != index):
            self._bring(each)
        copies, mark = self._here[index]
        self._side.wait(mark)
        self._put(index, copies)
        try:
            yield
        finally:
            self._put(index, self._host[index])

    def _turn(self, index: int) -> None:
        """Tell from the block that comes which way the blocks are run through."""
        if index != self._last:
            self._direction = 1 if index > self._last else -1
        if index == len(self._frozen) - 1:
            self._direction = -1
        elif index == 0:
            self._direction = 1
        self._last = index

    def _bring(self, index: int) -> None:
        if index in self._here:
            return
        with self._side.copying():
            copies = [t.to(self._device, non_blocking=True, copy=True) for t in self._host[index]]
        self._here[index] = copies, self._side.mark()

    def _put(self, index: int, copies: list[Tensor]) -> None:
        for tensor, copy in zip(self._frozen[index], copies, strict=True):
            tensor.data = copy


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class _Streamed(ModelHook):  # type: ignore[misc]
    """Runs a block's forward, compiled or not, with its weights in place."""

    def __init__(self, stream: WeightStream, index: int) -> None:
        super().__init__()
        self.stream, self.index = stream, index

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self.stream.on_device(self.index):
            return self.fn_ref.original_forward(*args, **kwargs)
