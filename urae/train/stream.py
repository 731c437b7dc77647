"""Frozen weights on the host, each block's brought to the device a block ahead of its use.

diffusers' group offloading does so for inference: it brings the next block in the order of the
forward, and puts weights back after a forward that ends. A backward pass that recomputes blocks
goes through them from last to first, and leaves each forward where nothing more is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from urae.generate.speed import list_blocks
from urae.train.host import SideStream

_HOOK = "urae_streamed_weights"


def stream_weights(transformer: FluxTransformer2DModel, device: torch.device) -> None:
    """Keep the frozen weights of the blocks on the host, pinned; all else goes to the device.

    At most two blocks' weights are on the device, beside those that a backward pass still needs.

    Args:
        transformer: On the CPU, with its adapters; the blocks are compiled before, if at all.
        device: Where it trains.
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


class WeightStream:
    """The weights of a row of blocks, which are run through forth and back.

    A block that computes has other tensors for its weights than one that waits: what autograd saves
    of a weight is the very tensor, and would follow it back to the host.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._side = SideStream(device)
        self._here: dict[int, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        self._last, self._direction = -1, 1
        self._places: list[list[_Place]] = []
        for block in blocks:
            for tensor in _tensors(block):
                if tensor.requires_grad:
                    tensor.data = tensor.data.to(device)
                elif device.type == "cuda":
                    tensor.data = tensor.data.pin_memory()
            self._places.append([each for each in _list_places(block) if not each.trains])
        self._host = [[place.tensor for place in places] for places in self._places]

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Put a block's weights in place on the device, and have the next block's brought."""
        self._turn(index)
        after = index + self._direction
        wanted = {index, after} if 0 <= after < len(self._places) else {index}
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
        if index == len(self._places) - 1:
            self._direction = -1
        elif index == 0:
            self._direction = 1
        self._last = index

    def _bring(self, index: int) -> None:
        if index in self._here:
            return
        with self._side.copying():
            copies = [self._copy(tensor) for tensor in self._host[index]]
        self._here[index] = copies, self._side.mark()

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().to(self._device, non_blocking=True, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(copy, requires_grad=False) if is_parameter else copy

    def _put(self, index: int, tensors: list[Tensor]) -> None:
        for place, tensor in zip(self._places[index], tensors, strict=True):
            place.owner[place.name] = tensor


class _Place(NamedTuple):
    """Where a module has a tensor: in its parameters or buffers."""

    owner: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.owner[self.name]
        return tensor

    @property
    def trains(self) -> bool:
        return self.tensor.requires_grad


def _list_places(block: nn.Module) -> Iterator[_Place]:
    for module in block.modules():
        for owner in (module._parameters, module._buffers):
            yield from (_Place(owner, name) for name, each in owner.items() if each is not None)


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
