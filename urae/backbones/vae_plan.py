"""What a VAE takes in bytes and work, and which of its maps to keep: known before anything runs.

A map between two units of the chain is kept whole or not at all. From one kept map to the next is a
segment; it runs on the whole map, or in stripes of rows, each made from the kept map with as many
rows more as its convolutions reach. A group norm on the way wants statistics of the whole picture,
so a pass over all stripes of its own. Hence fewer kept maps are less memory and more work. The plan
is the chain of segments of least work whose peak stays within a limit. Several ranks share the
stripes of a segment; what is not in stripes, each of them does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from diffusers import AutoencoderKL

from urae.backbones.vae_chain import (
    Blocks,
    Shape,
    Unit,
    find_scale_factor,
    find_shape,
    find_source_rows,
    list_decoder,
    list_encoder,
)
from urae.backbones.wide_attention import count_score_bytes

# what moving one number through an operation costs beside its multiplications, in multiplications:
# about the ratio of an H200's bfloat16 arithmetic to its memory
_TRAFFIC = 256
_MIN_ROWS = 4  # of a stripe


@dataclass(frozen=True)
class Segment:
    """Units from one kept map to the next."""

    ops: Unit
    shape: Shape
    """Of the map that it makes."""
    stripes: int
    """1: the whole map at once."""
    in_place: bool
    """Whether the new map takes the old one's memory."""
    peak_bytes: int
    work: int


@dataclass(frozen=True)
class VaePlan:
    """How to run an encoder or a decoder."""

    segments: tuple[Segment, ...]
    """None: the stock model runs whole."""
    peak_bytes: int
    """The most that is allocated at once, beside the weights and the argument."""
    work: float
    """Of one rank, relative to the stock model's."""

    @property
    def whole(self) -> bool:
        """Whether the stock model runs whole."""
        return not self.segments


def plan_decode(
    vae: AutoencoderKL,
    height: int,
    width: int,
    *,
    max_bytes: int | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    num_ranks: int = 1,
) -> VaePlan:
    """Plan the decoding of pictures of `height` x `width` pixels.

    Args:
        vae: With or without weights (on the meta device).
        height: In pixels.
        width: In pixels.
        max_bytes: What may be allocated beside the weights and the latents; None: any amount.
        batch: Pictures at once.
        dtype: Of the maps; default: the VAE's.
        device: Where it will run; default: where the VAE is.
        num_ranks: That do it together, each within `max_bytes`.

    Raises:
        MemoryError: If `max_bytes` does not suffice, however it is split.
        ValueError: If the VAE has blocks that FLUX's has not.
    """
    factor = find_scale_factor(vae)
    latents = Shape(vae.config.latent_channels, height // factor, width // factor)
    costs = _Costs(batch, dtype or vae.dtype, device or vae.device, num_ranks)
    return _plan(list_decoder(vae), latents, costs, max_bytes, f"decoding {width} x {height}")


def plan_encode(
    vae: AutoencoderKL,
    height: int,
    width: int,
    *,
    max_bytes: int | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> VaePlan:
    """Plan the encoding of pictures; arguments and errors as `plan_decode`."""
    pixels = Shape(vae.config.in_channels, height, width)
    costs = _Costs(batch, dtype or vae.dtype, device or vae.device)
    return _plan(list_encoder(vae), pixels, costs, max_bytes, f"encoding {width} x {height}")


def _plan(
    blocks: Blocks, shape: Shape, costs: "_Costs", max_bytes: int | None, what: str
) -> VaePlan:
    """Find the segments: a shortest path from map to map."""
    stock_peak, stock_work = _measure_stock(blocks, shape, costs)
    stock_bytes = stock_peak * costs.number_bytes
    max_bytes = stock_bytes if max_bytes is None else max_bytes
    if costs.num_ranks == 1 and stock_bytes <= max_bytes:
        return VaePlan((), stock_bytes, 1.0)
    units = [unit for block in blocks for unit in block]
    shapes = [shape]
    for unit in units:
        shapes.append(find_shape(unit, shapes[-1]))
    paths: list[tuple[Segment, ...] | None] = [()]  # to each map
    for end in range(1, len(units) + 1):
        found = []
        for start, before in enumerate(paths):
            if before is None:
                continue
            ways = _list_ways(units, shapes, start, end, costs)
            fitting = (way for way in ways if way.peak_bytes <= max_bytes)
            # the whole map, and the fewest stripes: more of them are more work
            segment = min(islice(fitting, 2), key=lambda way: way.work, default=None)
            if segment is not None:
                found.append((*before, segment))
        paths.append(min(found, key=_total_work, default=None))
    segments = paths[-1]
    if segments is None:
        least = _find_least_bytes(units, shapes, costs)
        raise MemoryError(
            f"{what} pixels needs at least {least / 2**30:.2f} GiB besides the weights, more than "
            f"the {max_bytes / 2**30:.2f} GiB available; free memory or choose a smaller size"
        )
    peak_bytes = max(segment.peak_bytes for segment in segments)
    return VaePlan(segments, peak_bytes, _total_work(segments) / stock_work)


def _total_work(segments: tuple[Segment, ...]) -> int:
    return sum(segment.work for segment in segments)


def _find_least_bytes(units: list[Unit], shapes: list[Shape], costs: "_Costs") -> int:
    least = [0]  # to reach each map
    for end in range(1, len(units) + 1):
        peaks = [
            max(least[start], way.peak_bytes)
            for start in range(end)
            for way in _list_ways(units, shapes, start, end, costs)
        ]
        least.append(min(peaks))
    return least[-1]


def _list_ways(
    units: list[Unit], shapes: list[Shape], start: int, end: int, costs: "_Costs"
) -> Iterator[Segment]:
    """List the ways from map `start` to map `end` in one segment: the more stripes, the leaner."""
    ops = tuple(op for unit in units[start:end] for op in unit)
    alone = end == start + 1
    if alone:
        yield _build_segment(ops, shapes[start], shapes[end], costs, first=start == 0)
    if not alone and any(op.kind == "attention" for op in ops):
        return
    stripes = max(2, costs.num_ranks)  # then doubled, so that all ranks have as many
    while stripes * _MIN_ROWS <= shapes[end].rows:
        yield _build_segment(ops, shapes[start], shapes[end], costs, stripes, first=start == 0)
        stripes *= 2


# --- bytes and work -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Costs:
    """What the numbers of a map cost, and what the device adds."""

    batch: int
    """Pictures at once."""
    dtype: torch.dtype
    device: torch.device
    num_ranks: int = 1
    """That share the stripes."""

    @property
    def number_bytes(self) -> int:
        """Bytes of one number, in all pictures."""
        return self.batch * self.dtype.itemsize

    @property
    def conv_copies(self) -> bool:
        """Whether convolutions copy what they read and write: cuDNN, into another layout."""
        return self.device.type not in ("cpu", "meta")

    @property
    def accumulator(self) -> float:
        """What torch's attention accumulates in float32, in sizes of its result."""
        return 4 / self.dtype.itemsize if self.conv_copies and self.dtype.itemsize < 4 else 0.0

    def count_scores(self, heads: int, queries: int, keys: int, width: int) -> int:
        """Return what scores of attention take, in numbers."""
        size = {"heads": heads * self.batch, "queries": queries, "keys": keys, "width": width}
        return count_score_bytes(self.device, self.dtype, **size) // self.number_bytes


def _build_segment(
    ops: Unit, source: Shape, shape: Shape, costs: _Costs, stripes: int = 1, *, first: bool
) -> Segment:
    """Find what a segment takes; the map before the first is the caller's, and not counted."""
    in_place = False
    if ops[0].kind == "attention":
        new, work = _measure_attention(ops[0].module.heads, source, costs, stripes)
        in_place = True
    elif stripes == 1:
        new, work = _measure(ops, source, costs)
    else:
        height = -(-shape.rows // stripes)
        start, stop = find_source_rows(ops, 0, height)
        stripe = source._replace(rows=min(stop - start, source.rows))
        new, work = _measure(ops, stripe, costs, stripes=stripes)
        new += find_shape(ops, stripe).size  # a stripe is put in place after the next is made
        # so the next, with what it reaches above itself, still finds the old map's rows
        in_place = source == shape and not first and -start <= height
        new += 0 if in_place else shape.size
    kept = 0 if first else source.size
    work //= costs.num_ranks if stripes > 1 else 1
    return Segment(ops, shape, stripes, in_place, (kept + new) * costs.number_bytes, work)


def _measure(
    ops: Unit, shape: Shape, costs: _Costs, *, stripes: int = 1, stock: bool = False
) -> tuple[int, int]:
    """Follow a map through operations other than attention.

    Args:
        ops: What runs.
        shape: Of the map, or of one stripe of it.
        costs: As above.
        stripes: If more than one, the stripe is a copy, and norms take a pass of their own.
        stock: Whether residual branches are added as the stock module does.

    Returns:
        The most numbers alive at once beside the map, and the work on all stripes.
    """
    current = peak = shape.size if stripes > 1 else 0
    conv_copies = costs.conv_copies
    skips: list[tuple[int, int]] = []  # numbers beside the map, numbers
    done = passes = 0
    for op in ops:
        if op.kind == "branch":
            skips.append((current, shape.size))
            current = 0
            continue
        held = current + sum(skip for skip, _ in skips) if skips else current
        size = shape.size
        made_shape = find_shape((op,), shape)
        made = made_shape.size
        read = skips.pop()[1] if op.kind == "join" else size
        if op.kind == "up":
            read = 4 * size
            held += read
        elif op.kind == "down":
            read = shape.channels * (shape.rows + 1) * (shape.columns + 1)  # padded
            held += read
        copies = read + made if conv_copies and op.channels else 0
        if op.kind == "join":  # the skip's convolution; the sum is made in place
            peak = max(peak, held + (made if op.channels else 0) + max(copies, 2 * made * stock))
        else:
            peak = max(peak, held + made + copies)
        if op.kind == "norm":
            passes += done + size * _TRAFFIC
        done += made * (_TRAFFIC + op.taps)
        shape, current = made_shape, made
    return peak, stripes * (done + (passes if stripes > 1 else 0))


def _measure_stock_attention(shape: Shape, costs: _Costs) -> tuple[int, int]:
    """As `_measure`, for the attention among all places of a map, by the stock module."""
    work = shape.size * (2 * shape.rows * shape.columns + 4 * shape.channels + 8 * _TRAFFIC)
    # normalised, query, key, value; then two more, or the accumulator
    return round(shape.size * max(6, 5 + costs.accumulator)), work


def _measure_attention(heads: int, shape: Shape, costs: _Costs, stripes: int) -> tuple[int, int]:
    """As `_measure_stock_attention`, for queries in stripes; it works in place."""
    rows = -(-shape.rows // stripes)
    stripe = shape.size * rows // shape.rows
    queries, keys = rows * shape.columns, shape.rows * shape.columns
    scores = costs.count_scores(heads, queries, keys, shape.channels // heads)
    accumulator = 0.0 if scores else costs.accumulator
    peak = 2 * shape.size + stripe * max(3, 2 + accumulator) + scores
    return round(peak), _measure_stock_attention(shape, costs)[1]


def _measure_stock(blocks: Blocks, shape: Shape, costs: _Costs) -> tuple[int, int]:
    """As `_measure`, for the stock model, which holds the map before a block until its end."""
    peak = total = 0
    for number, block in enumerate(blocks):
        before = shape.size if number else 0
        for index, unit in enumerate(block):
            held = before + (shape.size if index else 0)
            if unit[0].kind == "attention":
                new, work = _measure_stock_attention(shape, costs)
            else:
                new, work = _measure(unit, shape, costs, stock=True)
            peak, total = max(peak, held + new), total + work
            shape = find_shape(unit, shape)
    return peak, total
