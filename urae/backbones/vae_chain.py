"""A VAE as a chain of units, each a few operations on maps; which rows an operation's rows need.

Units are what stands between two maps that can be kept: a convolution, a residual block, a
resampling, the attention. The operations are stock modules, taken from a stock `AutoencoderKL`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from diffusers import AutoencoderKL


@dataclass(frozen=True)
class Op:
    """One operation: a stock module, or an end of a residual branch."""

    kind: Literal["conv", "up", "down", "norm", "act", "branch", "join", "attention"]
    module: Any = None
    """None for `branch`, and for a `join` without a convolution on the shortcut."""
    channels: int = 0
    """That its convolution makes; 0 without a convolution."""
    taps: int = 0
    """Multiplications of its convolution for one number of the result."""
    reach: int = 0
    """Rows beyond its own that its convolution reads, on either side."""


Unit = tuple[Op, ...]
Blocks = list[list[Unit]]
"""Units by the blocks of the stock model."""


class Shape(NamedTuple):
    """Channels, rows and columns of a map."""

    channels: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return self.channels * self.rows * self.columns


# --- rows -----------------------------------------------------------------------------------------


def split_rows(rows: int, stripes: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` rows into at most `stripes` stripes, only the last of them lower than the others.

    Yields:
        A stripe's first row, and the row after its last.
    """
    height = -(-rows // stripes)
    return ((first, min(first + height, rows)) for first in range(0, rows, height))


def find_source_rows(ops: Unit, first: int, last: int) -> tuple[int, int]:
    """Find the rows of a map that rows `first` to `last` - 1 of what is made of it depend on.

    They may lie beyond the picture, where convolutions see zeros. The first is a row that every
    stride falls on, so that modules run on these rows alone take the same ones as on the whole map.

    Returns:
        The first row, and the row after the last.
    """
    alignment = 1
    for op in reversed(ops):
        if op.kind == "conv":
            first, last = first - op.reach, last + op.reach
        elif op.kind == "up":  # doubled, then a 3 x 3 convolution
            first, last = (first - 1) // 2, last // 2 + 1
        elif op.kind == "down":  # row r reads rows 2r to 2r + 2
            first, last = 2 * first, 2 * last + 1
            alignment *= 2
    return first // alignment * alignment, -(-last // alignment) * alignment


def scale_rows(ops: Unit, rows: int) -> int:
    """Return how many rows come of `rows` rows, which is also where row `rows` goes."""
    for op in ops:
        rows = rows * 2 if op.kind == "up" else rows // 2 if op.kind == "down" else rows
    return rows


def find_shape(ops: Unit, shape: Shape) -> Shape:
    """Return the shape of what operations make of a map."""
    for op in ops:
        if op.channels:
            _, rows, columns = shape
            if op.kind in ("up", "down"):  # planning asks for millions of shapes
                rows, columns = scale_rows((op,), rows), scale_rows((op,), columns)
            shape = Shape(op.channels, rows, columns)
    return shape


# --- units ----------------------------------------------------------------------------------------


def find_scale_factor(vae: AutoencoderKL) -> int:
    """Return how many pixels of a side one latent stands for."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def list_decoder(vae: AutoencoderKL) -> Blocks:
    """List the units from latents to pixels.

    Raises:
        ValueError: If a block is none of FLUX's.
    """
    decoder = vae.decoder
    stem = (vae.post_quant_conv, decoder.conv_in)
    return [
        [(_conv(conv),) for conv in stem if conv is not None],
        _list_mid_block(decoder.mid_block),
        *map(_list_block, decoder.up_blocks),
        [_head(decoder)],
    ]


def list_encoder(vae: AutoencoderKL) -> Blocks:
    """List the units from pixels to the latents' moments; errors as `list_decoder`."""
    encoder = vae.encoder
    quant = () if vae.quant_conv is None else (_conv(vae.quant_conv),)
    return [
        [(_conv(encoder.conv_in),)],
        *map(_list_block, encoder.down_blocks),
        _list_mid_block(encoder.mid_block),
        [(*_head(encoder), *quant)],
    ]


def _list_block(block: Any) -> list[Unit]:
    if hasattr(block, "attentions"):
        raise ValueError(
            f"VAE block {type(block).__name__} has attention, which can only be split in the "
            "middle block; use a VAE of DownEncoderBlock2D and UpDecoderBlock2D, like FLUX's"
        )
    ups, downs = (getattr(block, name, None) or () for name in ("upsamplers", "downsamplers"))
    resamplings = [*(_conv(up, "up") for up in ups), *(_conv(down, "down") for down in downs)]
    return [*map(_resnet, block.resnets), *((op,) for op in resamplings)]


def _list_mid_block(block: Any) -> list[Unit]:
    first, *others = map(_resnet, block.resnets)
    units = [first]
    for attention, resnet in zip(block.attentions, others, strict=True):
        units += [resnet] if attention is None else [(Op("attention", attention),), resnet]
    return units


def _resnet(resnet: Any) -> Unit:
    shortcut = resnet.conv_shortcut
    return (
        Op("branch"),
        Op("norm", resnet.norm1),
        Op("act", resnet.nonlinearity),
        _conv(resnet.conv1),
        Op("norm", resnet.norm2),
        Op("act", resnet.nonlinearity),
        _conv(resnet.conv2),
        Op("join") if shortcut is None else _conv(shortcut, "join"),
    )


def _head(model: Any) -> Unit:
    return Op("norm", model.conv_norm_out), Op("act", model.conv_act), _conv(model.conv_out)


def _conv(module: Any, kind: Literal["conv", "up", "down", "join"] = "conv") -> Op:
    conv = module.conv if kind in ("up", "down") else module
    taps = conv.weight.numel() // conv.out_channels
    return Op(kind, module, conv.out_channels, taps, conv.kernel_size[0] // 2)
