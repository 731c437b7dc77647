"""Local attention: image tokens see their neighbourhood, the text and a coarse view of the rest.

The picture is cut into tiles, and the image tokens go tile by tile through the transformer, which
does not mind their order: position ids travel along. Each tile sees a window of tiles. Every token
of text sees all and is seen by all, as in CLEAR (arXiv:2412.16112), which found a window and the
text enough after tuning.

**Whole blocks.** The sequence is then cut into blocks as long as a tile, and a block sees all of
each block of which one of its tokens sees one: on FLUX.1 the blocks are FlexAttention's own, and
nothing is masked inside of one. Tiles follow one another there and back, row by row, so that a
block is of neighbours even where a row of tiles ends.

**The coarse global path** is one token of every tile, its anchor, that all tokens see: a picture of
1/128 of the tokens on FLUX.1. It needs no layer, head or kernel of its own, so that one mask serves
every block; image tokens see about equally many keys, so that one softmax scale is right for all;
and anchors see what their tile sees, so that no lattice of tokens is computed differently.
Full attention in a few layers would be exact there, but dearer, at another scale.

All sizes follow from the native side s (FLUX.1: 64 tokens): tiles of at most s/4 x s/8 tokens, and
a window of 5 x 9 tiles, 1.25 s x 1.125 s. Sides that are no multiple are cut evenly, so a window is
never smaller than s x s. At borders it is moved inwards, not cut off, as in neighborhood attention
(arXiv:2204.07143).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from urae.geometry import build_image_ids

WINDOW = (5, 9)
"""Tiles that a tile sees, down and across."""
SMALLEST_SIDE = 8
"""Tokens; below it a tile of s/4 x s/8 would be none."""
_BLOCK = 128  # FlexAttention's own, and s^2 / 32 of FLUX.1
_REMEDY = "use ResolutionPolicy(attention='full') and leave out the part local-attention"


@dataclass(frozen=True, eq=False)
class LocalAttention:
    """Which keys each token of one grid sees.

    The sequence is the text, then all anchors, then the other image tokens, both tile by tile.
    Tokens of a group are alike: they are a block of it.
    """

    order: Int[Tensor, " image"]
    """Of each image token of the sequence, its place in the picture, rows first."""
    groups: Int[Tensor, " sequence"]
    """Of each token of the sequence, text included, its group."""
    sees: Bool[Tensor, "groups groups"]
    """Whether a query of the first group sees a key of the second."""

    @cached_property
    def inverse(self) -> Int[Tensor, " image"]:
        """Place in the sequence, after the text, of each image token of the picture."""
        return self.order.argsort()

    @cached_property
    def is_full(self) -> bool:
        """Tell whether everything sees everything."""
        return bool(self.sees.all())

    @cached_property
    def num_keys(self) -> float:
        """Keys that an image token sees, text included; the mean where tiles are uneven."""
        keys = self.sees.float() @ self.groups.bincount(minlength=len(self.sees)).float()
        return float(keys[self.groups[-len(self.order) :]].mean())

    def build_mask(self) -> Bool[Tensor, "1 1 sequence sequence"]:
        """Spell the pattern out, queries by keys: L^2 bytes."""
        return self.sees[self.groups[:, None], self.groups][None, None]

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same for FlexAttention, from the groups in each block, without the L^2 bytes."""
        groups, sees, length = self.groups, self.sees, len(self.groups)
        blocks = torch.arange(length, device=groups.device) // _BLOCK
        members = sees.new_zeros(math.ceil(length / _BLOCK), len(sees), dtype=torch.float32)
        members.index_put_((blocks, groups), members.new_ones(()), accumulate=True)
        pairs = members @ sees.float() @ members.T  # visible ones of each block, exact integers
        full = pairs == _BLOCK**2

        def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees[groups[query], groups[key]]

        return BlockMask.from_kv_blocks(
            *_list_blocks((pairs > 0) & ~full),
            *_list_blocks(full),
            BLOCK_SIZE=_BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(length, length),
        )


def _list_blocks(
    chosen: Bool[Tensor, "q k"],
) -> tuple[Int[Tensor, "1 1 q"], Int[Tensor, "1 1 q k"]]:
    """Count the chosen blocks of each row, and name them first, as a BlockMask wants."""
    columns = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


@lru_cache(maxsize=8)
def build_local_attention(
    rows: int, columns: int, num_text: int, native_side: int, device: torch.device
) -> LocalAttention:
    """Find the pattern of a grid of image tokens; the newest eight are kept.

    Args:
        rows: Image tokens down the picture.
        columns: Image tokens across.
        num_text: Text tokens before them.
        native_side: s, tokens along a side of the base's native square, 8 or more.
        device: Where the pattern is to be.
    """
    down = _cut(rows, native_side // 4, WINDOW[0])
    across = _cut(columns, native_side // 8, WINDOW[1])
    num_tiles = len(down.sees) * len(across.sees)
    places = torch.arange(num_tiles).view(-1, len(across.sees))
    places[1::2] = places[1::2].flip(1)  # of each tile in the sequence: there and back
    tiles = places[down.tiles[:, None], across.tiles].flatten()
    anchors = (down.centres[:, None] & across.centres).flatten()
    kinds = torch.where(anchors, 1, 1 + num_tiles) + tiles  # 0 is the text
    order = kinds.argsort(stable=True)
    window = torch.kron(down.sees.int(), across.sees.int()).bool()  # by tile, row after row
    by_place = places.flatten().argsort()
    sees = torch.ones(1 + 2 * num_tiles, 1 + 2 * num_tiles, dtype=torch.bool)
    sees[1:, 1 + num_tiles :] = window[by_place][:, by_place].repeat(2, 1)
    kinds = torch.cat([kinds.new_zeros(num_text), kinds[order]])
    blocks = torch.arange(len(kinds)) // (native_side**2 // 32)
    members = torch.zeros(int(blocks[-1]) + 1, len(sees))
    members[blocks, kinds] = 1
    sees = members @ sees.float() @ members.T > 0
    return LocalAttention(order.to(device), blocks.to(device), sees.to(device))


@dataclass(frozen=True)
class _Axis:
    tiles: Int[Tensor, " tokens"]
    centres: Bool[Tensor, " tokens"]
    sees: Bool[Tensor, "tiles tiles"]


def _cut(size: int, tile: int, window: int) -> _Axis:
    """Cut one axis evenly into tiles of at most `tile` tokens, each seeing `window` of them."""
    num_tiles = math.ceil(size / tile)
    tiles = torch.arange(size) * num_tiles // size
    lengths = tiles.bincount()
    starts = lengths.cumsum(0) - lengths
    centres = torch.zeros(size, dtype=torch.bool)
    centres[starts + lengths // 2] = True
    index = torch.arange(num_tiles)
    first = (index - window // 2).clamp(max=num_tiles - window).clamp(min=0)
    after = index - first[:, None]
    return _Axis(tiles, centres, (after >= 0) & (after < window))


def list_processors(transformer: Any) -> list[Any]:
    """List the attention processors that take a backend: diffusers' own do, a user's may not."""
    each = transformer.attn_processors.values()
    return [processor for processor in each if hasattr(processor, "_attention_backend")]


def find_grid(image_ids: Float[Tensor, "*b tokens 3"]) -> tuple[int, int]:
    """Return rows and columns of the picture that these position ids (float32) number.

    Reads them back, so it waits for the device.

    Raises:
        ValueError: If they are not those of one picture, rows first.
    """
    ids = image_ids[0] if image_ids.ndim == 3 else image_ids
    ids = ids - ids[0]
    columns = int((ids[:, 1] == 0).sum())
    rows = len(ids) // columns
    grid = build_image_ids(rows, columns, ids.device)
    if ids.shape != grid.shape or not torch.equal(ids, grid):
        raise ValueError(
            f"local attention needs the tokens of one picture in row order; these {len(ids)} "
            "position ids do not form one (reference pictures, such as Kontext's, are not "
            f"supported); {_REMEDY}"
        )
    return rows, columns


def reorder_inputs(arguments: dict[str, Any], order: Int[Tensor, " image"]) -> None:
    """Put the image tokens of a FLUX forward's arguments in another order, in place.

    A ControlNet's residuals belong to image tokens too.
    """
    for name in ("hidden_states", "img_ids"):
        arguments[name] = arguments[name].index_select(-2, order)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        if arguments.get(name) is not None:
            arguments[name] = [sample.index_select(1, order) for sample in arguments[name]]


class LocalForward:
    """Local attention around the forward of a stock FLUX transformer.

    The mask goes the way that stock processors have for one, `joint_attention_kwargs`. The
    attention backend decides its form: a block mask for `flex`, a boolean one for those of torch.
    Where the user has set none on the transformer, it is `flex` on CUDA and `native` elsewhere for
    as long as attention is local.
    """

    def __init__(self, native_side: int) -> None:
        self.native_side = native_side
        self.is_on = True  # or full for now, with the tokens in the same order
        self._pattern: LocalAttention | None = None
        self._ids: Tensor | None = None
        self._grid = (0, 0)
        self._chosen: dict[Any, AttentionBackendName] = {}  # by processor
        self._compiled: dict[nn.Module, Any] = {}  # attention modules, and how they are called

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(
        self, module: nn.Module, arguments: dict[str, Any], given_ids: Tensor
    ) -> float | None:
        """Make the arguments of one forward local, in place, if its picture is larger than native.

        Args:
            module: A stock `FluxTransformer2DModel`.
            arguments: Of its forward, by name, position ids in float32.
            given_ids: The image's position ids as the caller gave them. Pipelines give the same
                tensor in each step, so that the device is waited for once a picture.

        While it is off the tokens go in the same order, since step caches carry outputs from one
        step to the next.

        Returns:
            The keys that an image token sees; None where attention is full.

        Raises:
            ValueError: If the tokens are no picture, or something here excludes the mask.
        """
        self._pattern = self._find_pattern(arguments, given_ids)
        self._release()
        if self._pattern is None:
            return None
        _check_possible(module, arguments)
        device = arguments["hidden_states"].device
        backend = self._choose_backend(module, device)
        reorder_inputs(arguments, self._pattern.order)
        if not self.is_on:
            self._release()
            return None
        if device.type == "cuda":
            self._compile_attention(module)
        flex = backend == AttentionBackendName.FLEX
        mask = self._pattern.block_mask if flex else self._pattern.build_mask()
        given = arguments.get("joint_attention_kwargs") or {}
        arguments["joint_attention_kwargs"] = {**given, "attention_mask": mask}
        return self._pattern.num_keys

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Put the tokens of the output back in the picture's order (a forward hook)."""
        if self._pattern is None:
            return output
        inverse = self._pattern.inverse
        if isinstance(output, tuple):
            return (output[0].index_select(1, inverse), *output[1:])
        return type(output)(sample=output.sample.index_select(1, inverse))

    def remove(self) -> None:
        """Take back what was set on the transformer."""
        self._release()
        self._compiled = {}

    def _find_pattern(self, arguments: dict[str, Any], given_ids: Tensor) -> LocalAttention | None:
        image_ids, text_ids = arguments["img_ids"], arguments["txt_ids"]
        if image_ids.shape[-2] <= self.native_side**2:
            return None
        if given_ids is not self._ids:
            self._ids, self._grid = given_ids, find_grid(image_ids)
        device = arguments["hidden_states"].device
        num_text = text_ids.shape[-2]
        pattern = build_local_attention(*self._grid, num_text, self.native_side, device)
        return None if pattern.is_full else pattern

    def _choose_backend(self, module: Any, device: torch.device) -> AttentionBackendName:
        processors = list_processors(module)
        if len(processors) < len(module.attn_processors):
            kinds = {type(each).__name__ for each in module.attn_processors.values()}
            raise ValueError(
                "local attention needs diffusers' own attention processors, not "
                f"{', '.join(sorted(kinds))}, which accept no attention backend; {_REMEDY}"
            )
        backends = {processor._attention_backend for processor in processors}
        on_gpu = device.type == "cuda"
        if backends == {None}:
            backend = AttentionBackendName.FLEX if on_gpu else AttentionBackendName.NATIVE
            self._chosen = dict.fromkeys(processors, backend)
            for processor in processors:
                processor._attention_backend = backend
            return backend
        if len(backends) > 1 or (on_gpu and backends != {AttentionBackendName.FLEX}):
            names = ", ".join(sorted(str(getattr(each, "value", each)) for each in backends))
            raise ValueError(
                "on a GPU, local attention needs the attention backend flex for all blocks, not "
                f"{names}; call transformer.reset_attention_backend(), or {_REMEDY}"
            )
        return AttentionBackendName(backends.pop())

    def _release(self) -> None:
        for attention in self._compiled:
            attention._compiled_call_impl = None
        for processor, backend in self._chosen.items():
            if processor._attention_backend == backend:
                processor._attention_backend = None
        self._chosen = {}

    def _compile_attention(self, module: Any) -> None:
        """Compile the attention of blocks that are not compiled themselves, for this forward.

        FlexAttention outside of a compiled function holds all L^2 scores.
        """
        blocks: Iterable[Any] = (*module.transformer_blocks, *module.single_transformer_blocks)
        for block in blocks:
            attention = block.attn
            if _is_compiled(block) or attention._compiled_call_impl is not None:
                continue
            if attention not in self._compiled:
                attention.compile()
                self._compiled[attention] = attention._compiled_call_impl
            attention._compiled_call_impl = self._compiled[attention]


def _is_compiled(block: Any) -> bool:
    """Tell whether a block is compiled as a whole: by torch, or by a hook that says so."""
    registry = getattr(block, "_diffusers_hook", None)
    hooks = () if registry is None else registry.hooks.values()
    by_hook = any(getattr(hook, "is_compiled", False) for hook in hooks)
    return by_hook or block._compiled_call_impl is not None


def _check_possible(module: Any, arguments: dict[str, Any]) -> None:
    parallel = getattr(module, "_parallel_config", None)
    if parallel is not None and parallel.context_parallel_config is not None:
        raise ValueError(
            "local attention cannot be combined with context parallelism, where each rank holds "
            f"only a part of the keys; {_REMEDY}"
        )
    if "attention_mask" in (arguments.get("joint_attention_kwargs") or {}):
        raise ValueError(
            "local attention sets its own attention_mask; leave yours out of "
            f"joint_attention_kwargs, or {_REMEDY}"
        )
