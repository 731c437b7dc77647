"""Exact encoding and decoding of large pictures in little memory, by any stock `AutoencoderKL`.

Stock tiling gives each tile its own normalisation and attention, so its pictures differ from whole
ones. Here the picture's maps are split into stripes of rows with what their convolutions reach
beyond them, group norms take statistics of the whole picture, and attention sees all of it: the
result is that of the unsplit model to rounding. The stock modules do the computing; nothing in the
VAE is replaced. `vae_plan` decides where to split.

Several ranks decode one picture together: each makes a band of every map, and then has the others'
bands sent. They hold the same maps and statistics as one rank with the same stripes.
"""

import logging
from collections.abc import Iterator
from traceback import clear_frames

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.utils.accelerate_utils import apply_forward_hook
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from urae.backbones.free_memory import (
    free_bytes,
    is_out_of_memory,
    release_memory,
    vae_bytes,
)
from urae.backbones.ranks import find_least
from urae.backbones.vae_chain import (
    Unit,
    find_scale_factor,
    find_source_rows,
    scale_rows,
    split_rows,
)
from urae.backbones.vae_plan import Segment, VaePlan, plan_decode, plan_encode
from urae.backbones.wide_attention import attend

logger = logging.getLogger(__name__)

_LEANER = 0.8  # of what a decoding ran out of memory with
_SLOW_NORMS = ("cuda",)  # devices on which torch's own group norm is slower than what is here

Moments = tuple[Float[Tensor, "b g"], Float[Tensor, "b g"]]


@torch.no_grad()
def decode(
    vae: AutoencoderKL,
    latents: Float[Tensor, "b c h w"],
    *,
    max_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> Float[Tensor, "b 3 height width"]:
    """Decode latents into pixels, split as far as `max_bytes` demands.

    Args:
        vae: Unchanged afterwards; its own tiling and slicing are not used.
        latents: As the VAE's encoder makes them (not those of the transformer), in its dtype and
            on the device where it is to run.
        max_bytes: What may be allocated beside the weights and the latents; None: any amount.
        group: Ranks that call this with the same latents and share the work; the least of their
            `max_bytes` counts, and all have the pixels.

    Returns:
        Pixels in about [-1, 1].

    Raises:
        MemoryError: If there is no way within `max_bytes`.
    """
    batch, _, rows, columns = latents.shape
    factor = find_scale_factor(vae)
    if group is not None and max_bytes is not None:
        (max_bytes,) = find_least([max_bytes], latents.device, group)
    plan = plan_decode(
        vae, factor * rows, factor * columns,
        max_bytes=max_bytes, batch=batch, device=latents.device, dtype=latents.dtype,
        num_ranks=1 if group is None else dist.get_world_size(group),
    )  # fmt: skip
    pixels: Tensor = apply_forward_hook(_decode)(vae, latents, plan, group)
    return pixels


def decode_within_free(
    vae: AutoencoderKL, latents: Float[Tensor, "b c h w"], group: ProcessGroup | None = None
) -> Float[Tensor, "b 3 height width"]:
    """Decode within what is free; alone, in thinner stripes where memory runs out all the same.

    An allocator loses memory between the blocks that it keeps, and the steps before are dear.

    Args:
        vae: As in `decode`.
        latents: As in `decode`.
        group: As in `decode`.

    Raises:
        MemoryError: If there is no way within what is free.
    """
    device = latents.device
    batch, _, rows, columns = latents.shape
    pixels = batch * find_scale_factor(vae) ** 2 * rows * columns
    max_bytes = vae_bytes(device, free_bytes(device), pixels)
    while True:
        try:
            return decode(vae, latents, max_bytes=max_bytes, group=group)
        except RuntimeError as error:
            if group is not None or not is_out_of_memory(error):  # the others of it would wait
                raise
            clear_frames(error.__traceback__)  # which keep what the failed try held
        max_bytes = int(_LEANER * max_bytes)
        release_memory(device)
        logger.info("decoding ran out of memory: trying within %.1f GiB", max_bytes / 2**30)


@torch.no_grad()
def encode(
    vae: AutoencoderKL, pixels: Float[Tensor, "b 3 height width"], *, max_bytes: int | None = None
) -> Float[Tensor, "b moments h w"]:
    """Encode pixels into the moments of their latents, split as far as `max_bytes` demands.

    Args:
        vae: Unchanged afterwards; its own tiling and slicing are not used.
        pixels: In [-1, 1], in the VAE's dtype and on the device where it is to run.
        max_bytes: What may be allocated beside the weights and the pixels; None: any amount.

    Returns:
        Means, then log variances, as `DiagonalGaussianDistribution` of diffusers takes them.

    Raises:
        MemoryError: If there is no way within `max_bytes`.
    """
    batch, _, height, width = pixels.shape
    plan = plan_encode(
        vae, height, width,
        max_bytes=max_bytes, batch=batch, device=pixels.device, dtype=pixels.dtype,
    )  # fmt: skip
    moments: Tensor = apply_forward_hook(_encode)(vae, pixels, plan)
    return moments


# run by accelerate's hook, which brings an offloaded VAE to the device
def _decode(
    vae: AutoencoderKL, latents: Tensor, plan: VaePlan, group: ProcessGroup | None
) -> Tensor:
    if not plan.whole:
        return _run_segments(plan.segments, latents, group)
    quant = vae.post_quant_conv
    pixels: Tensor = vae.decoder(latents if quant is None else quant(latents))
    return pixels


def _encode(vae: AutoencoderKL, pixels: Tensor, plan: VaePlan) -> Tensor:
    if not plan.whole:
        return _run_segments(plan.segments, pixels)
    moments: Tensor = vae.encoder(pixels)
    return moments if vae.quant_conv is None else vae.quant_conv(moments)


# --- segments -------------------------------------------------------------------------------------


def _run_segments(
    segments: tuple[Segment, ...], kept: Tensor, group: ProcessGroup | None = None
) -> Tensor:
    for segment in segments:
        stripes = _Stripes(segment.stripes, group)
        if segment.ops[0].kind == "attention":
            _attend(segment.ops[0].module, kept, stripes)
        elif segment.stripes == 1:
            kept = _run(segment.ops, kept)
        else:
            kept = _run_stripes(segment, kept, stripes)
    return kept


class _Stripes:
    """The stripes of a map, and which rank makes which: consecutive ones, as many as the others."""

    def __init__(self, count: int, group: ProcessGroup | None = None) -> None:
        self.count = count
        self.group = group
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def split(self, rows: int) -> list[list[tuple[int, int]]]:
        """Cut rows into stripes, by the rank that makes them; of few rows some ranks have none."""
        stripes = list(split_rows(rows, self.count))
        each = -(-len(stripes) // self.num_ranks)
        return [stripes[rank * each : (rank + 1) * each] for rank in range(self.num_ranks)]

    def split_own(self, rows: int) -> list[tuple[int, int]]:
        """Return this rank's stripes."""
        return self.split(rows)[self.rank]

    def share(self, made: Float[Tensor, "b c h w"]) -> None:
        """Fill in the rows that other ranks have made, a stripe at a time to save memory."""
        if self.group is None:
            return
        for owner, stripes in enumerate(self.split(made.shape[2])):
            for first, last in stripes:
                rows = made[:, :, first:last].contiguous()
                dist.broadcast(rows, group=self.group, group_src=owner)
                made[:, :, first:last] = rows


def _run_stripes(segment: Segment, kept: Tensor, stripes: _Stripes) -> Tensor:
    """Make the map after a segment from the one before it."""
    ops = segment.ops
    moments: list[Moments] = []  # of the norms in it, one after the other
    for index, op in enumerate(ops):
        if op.kind == "norm":
            moments.append(_find_moments(ops[:index], op.module, kept, stripes, moments))
    made = kept if segment.in_place else kept.new_empty(len(kept), *segment.shape)
    waiting: tuple[int, Tensor] | None = None  # until the next stripe has read the rows beneath it
    for first, last in stripes.split_own(segment.shape.rows):
        rows = _run_rows(ops, kept, first, last, moments)
        _put(made, waiting)
        waiting = first, rows
    _put(made, waiting)
    stripes.share(made)
    return made


def _put(made: Tensor, stripe: tuple[int, Tensor] | None) -> None:
    """Put a stripe into its place in a map."""
    if stripe is not None:
        first, rows = stripe
        made[:, :, first : first + rows.shape[2]] = rows


def _run_rows(
    ops: Unit, kept: Tensor, first: int, last: int, moments: list[Moments]
) -> Float[Tensor, "b c rows w"]:
    """Make rows `first` to `last` - 1 of what operations make of a map."""
    start, stop = find_source_rows(ops, first, last)
    start = max(start, 0)
    rows = _run(ops, kept[:, :, start:stop].contiguous(), moments)
    offset = scale_rows(ops, start)
    return rows[:, :, first - offset : last - offset]


def _run(ops: Unit, rows: Tensor, moments: list[Moments] | None = None) -> Tensor:
    """Run the stock modules on a map, or on rows of it and with the whole map's moments.

    Each convolution pads with zeros, so that away from the picture's border its outermost rows are
    wrong, and one row more with each further convolution: they are those to be cut off.
    """
    skips: list[Tensor] = []
    given: Iterator[Moments] = iter(moments or ())
    for op in ops:
        if op.kind == "branch":
            skips.append(rows)
        elif op.kind == "join":
            rows += skips.pop() if op.module is None else op.module(skips.pop())
        elif op.kind == "norm" and moments is not None:
            rows = _normalize(op.module, rows, next(given))
        elif op.kind == "norm" and rows.device.type in _SLOW_NORMS:
            rows = _normalize(op.module, rows, _find_own_moments(op.module, rows))
        else:
            rows = op.module(rows)
    return rows


# --- group norms ----------------------------------------------------------------------------------


def _find_moments(
    ops: Unit, norm: nn.GroupNorm, kept: Tensor, stripes: _Stripes, moments: list[Moments]
) -> Moments:
    """Find mean and variance of each group of what operations make of a map, in float32."""
    batch, rows = len(kept), scale_rows(ops, kept.shape[2])
    places = list(split_rows(rows, stripes.count))
    found = kept.new_zeros(2, batch, norm.num_channels, len(places), dtype=torch.float32)
    for first, last in stripes.split_own(rows):
        made = _run_rows(ops, kept, first, last, moments)
        found[..., places.index((first, last))] = _find_channel_moments(made)
    if stripes.group is not None:
        dist.all_reduce(found, group=stripes.group)  # fills in what the others have found
    shares = torch.tensor([last - first for first, last in places], device=kept.device) / rows
    return _join_moments(norm, found, shares)


def _find_own_moments(norm: nn.GroupNorm, rows: Float[Tensor, "b c h w"]) -> Moments:
    """Find them of a whole map.

    torch's own group norm has one block of threads a group on a GPU, and takes four times as long
    as both parts of this on an H200 (LOG.md).
    """
    return _join_moments(norm, _find_channel_moments(rows)[..., None], rows.new_ones(1).float())


def _join_moments(
    norm: nn.GroupNorm, found: Float[Tensor, "2 b c stripes"], shares: Float[Tensor, " stripes"]
) -> Moments:
    """Join the moments of channels, and of their shares of the rows, to those of groups.

    The group's variance is the mean of theirs and the variance of their means, so that no large
    sums cancel.
    """
    batch = found.shape[1]
    # each b x groups x channels of a group x stripes
    variances, means = found.reshape(2, batch, norm.num_groups, -1, len(shares))
    mean = (means * shares).sum(3).mean(2)
    variances = variances + (means - mean[:, :, None, None]).square()
    return mean, (variances * shares).sum(3).mean(2)


def _find_channel_moments(rows: Float[Tensor, "b c h w"]) -> Float[Tensor, "2 b c"]:
    """Find variance and mean of each channel, in float32.

    Half of the channels at a time: their copy in float32 takes the room of the normalised map.
    """
    halves = [torch.var_mean(half.float(), (2, 3), correction=0) for half in rows.chunk(2, dim=1)]
    return torch.stack([torch.cat(each, dim=1) for each in zip(*halves, strict=True)])


def _normalize(norm: nn.GroupNorm, rows: Tensor, moments: Moments) -> Tensor:
    """Apply a group norm with given moments.

    It is a batch norm of known statistics, with the rows of our channels for its channels: they are
    many enough to occupy a GPU.
    """
    batch, channels, height, width = rows.shape
    repeats = channels // norm.num_groups * height
    mean, variance = (values.repeat_interleave(repeats, dim=1).flatten() for values in moments)
    weight, bias = (
        values.repeat_interleave(height).repeat(batch) for values in _read_affine(norm, rows.device)
    )
    normalized = torch.batch_norm(
        rows.reshape(1, -1, width), weight, bias, mean, variance,
        training=False, momentum=0.0, eps=norm.eps, cudnn_enabled=False,
    )  # fmt: skip
    return normalized.view_as(rows)


def _read_affine(norm: nn.GroupNorm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Read a norm's weight and bias in float32, from wherever offloading keeps them."""
    hook = getattr(norm, "_hf_hook", None)  # accelerate's, which brings a module when it is called
    if hook is not None:
        hook.pre_forward(norm)
    weight, bias = (each.to(device, torch.float32, copy=True) for each in (norm.weight, norm.bias))
    if hook is not None:
        hook.post_forward(norm, None)
    return weight, bias


# --- attention ------------------------------------------------------------------------------------


def _attend(attention: Attention, kept: Tensor, stripes: _Stripes) -> None:
    """Run the middle block's attention in place: all keys and values, queries in stripes.

    Keys and values are little work beside the rest, and every rank makes all of them.
    """
    batch, channels, height, width = kept.shape
    moments = _find_moments((), attention.group_norm, kept, stripes, [])
    keys, values = (kept.new_empty(batch, height * width, channels) for _ in range(2))

    def read(first: int, last: int) -> Float[Tensor, "b tokens c"]:
        rows = _normalize(attention.group_norm, kept[:, :, first:last].contiguous(), moments)
        return rows.flatten(2).transpose(1, 2)

    def split_heads(tokens: Float[Tensor, "b tokens c"]) -> Float[Tensor, "b heads tokens d"]:
        return tokens.view(batch, -1, attention.heads, channels // attention.heads).transpose(1, 2)

    def answer(query: Float[Tensor, "b tokens c"]) -> Float[Tensor, "b c tokens"]:
        q, k, v = map(split_heads, (query, keys, values))
        found = attend(q, k, v).transpose(1, 2).flatten(2)
        made: Tensor = attention.to_out[0](found)
        return made.transpose(1, 2)

    for first, last in split_rows(height, stripes.count):
        place = slice(first * width, last * width)
        tokens = read(first, last)
        keys[:, place] = attention.to_k(tokens)
        values[:, place] = attention.to_v(tokens)
        del tokens
    for first, last in stripes.split_own(height):
        found = answer(attention.to_q(read(first, last)))
        kept[:, :, first:last] += found.view(batch, channels, last - first, width)
        del found
    stripes.share(kept)
