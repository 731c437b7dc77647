"""Turn adapters into one plain LoRA, for stock diffusers or for kohya and ComfyUI."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from urae.adapters.files import AdapterFile, LowRank, check_fits, read_adapter, write_lora
from urae.adapters.initial import OpenWeights, Progress, compute_updates, stack_updates
from urae.adapters.kohya import BLOCKS, MLP_RATIO
from urae.backbones.devices import pick_device
from urae.backbones.flux import TEXT_COMPONENTS, build_meta_transformer, fetch_model
from urae.backbones.weights import open_weight_files
from urae.choices import LoraFormat
from urae.config import check_types
from urae.storage import check_folder, write_tensors


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert."""

    adapters: tuple[str, ...]
    """In order, as `urae.adapt` takes them: a raw minor adapter after its 2K LoRA."""
    output: Path
    """The file to write."""
    model: str | None = None
    """Base; only a minor adapter that does not hold its B0 and A0 needs it."""
    format: LoraFormat = "diffusers"
    """Keys: `transformer.` ... of diffusers, or `lora_unet_` ... of kohya and ComfyUI."""
    overwrite: bool = False
    """Replace the output if it exists."""

    def __post_init__(self) -> None:
        check_types(self)


def convert(config: ConvertConfig, *, progress: Progress | None = None) -> Path:
    """Write one plain LoRA that does what a list of adapters does together.

    A minor adapter becomes down [A; A0], up [B, -B0] (arXiv:2503.16322, section 3.2); several
    adapters are stacked, so the rank is the sum.

    Args:
        config: What to convert.
        progress: Called with matrices solved and in all, where B0 and A0 must be computed.

    Returns:
        The file written.

    Raises:
        ValueError: If an adapter is damaged or for another base, or the base is needed.
        FileNotFoundError: If an adapter or the base is missing.
        PermissionError: If the base is gated.
        FileExistsError: If the output exists and `overwrite` is off.
        OSError: If the disk is full; the output is whole or as it was.
    """
    if config.output.suffix != ".safetensors":
        raise ValueError(f"output {config.output} must end in .safetensors")
    if config.output.is_dir():
        raise FileExistsError(f"output {config.output} is a folder; name a .safetensors file")
    if config.output.exists() and not config.overwrite:
        raise FileExistsError(
            f"{config.output} already exists and is kept; replace it with --overwrite"
        )
    check_folder(config.output.parent)
    files = [read_adapter(source) for source in config.adapters]
    if not files:
        raise ValueError("no adapter to convert; name one or more files")
    if config.format == "kohya":  # before anything is solved
        to_kohya({name: pair for file in files for name, pair in file.layers.items()})
    open_weights = None if config.model is None else _open_base(config.model, files)
    updates = compute_updates(files, open_weights, device=pick_device(), progress=progress)
    layers = stack_updates(updates)
    metadata = {"urae.format": "1", "urae.kind": "lora"}
    for file in files:
        kept = ("urae.policy", "urae.base_model", "urae.base_revision")
        metadata |= {key: file.metadata[key] for key in kept if key in file.metadata}
    if config.format == "kohya":
        write_tensors(config.output, to_kohya(layers), metadata)
    else:
        write_lora(config.output, layers, metadata)
    return config.output


def _open_base(model: str, files: Sequence[AdapterFile]) -> OpenWeights:
    path = fetch_model(model, without=("scheduler", "vae", *TEXT_COMPONENTS))
    meta = build_meta_transformer(path)
    for file in files:
        check_fits(file, meta)
    return lambda layers: open_weight_files(path, layers)


def to_kohya(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Name factors as kohya's trainer and ComfyUI do, layers that are one matrix there joined.

    Raises:
        ValueError: If a layer has no kohya name.
    """
    remaining = dict(layers)
    blocks = sorted({tuple(name.split(".", 2)[:2]) for name in layers if name.count(".") >= 2})
    tensors: dict[str, Tensor] = {}
    for kind, index in blocks:
        if kind not in BLOCKS:
            continue
        kohya_kind, table = BLOCKS[kind]
        for kohya_name, parts in table.items():
            prefix = f"{kind}.{index}."
            pairs = [remaining.pop(prefix + part, None) for part in parts]
            if any(pair is not None for pair in pairs):
                joined = _join(pairs)
                key = f"lora_unet_{kohya_kind}_{index}_{kohya_name}"
                tensors[f"{key}.lora_down.weight"] = joined.down.contiguous()
                tensors[f"{key}.lora_up.weight"] = joined.up.contiguous()
                tensors[f"{key}.alpha"] = torch.tensor(float(joined.down.shape[0]))
    if remaining:
        raise ValueError(f"layer {next(iter(remaining))} has no name in kohya's format")
    return tensors


def _join(pairs: Sequence[LowRank | None]) -> LowRank:
    """Stack factors of layers that share an input into one block-diagonal pair."""
    present = [pair for pair in pairs if pair is not None]
    if len(pairs) == 1:
        return present[0]
    # a missing q, k or v is as wide as the others, a missing MLP (the fourth) four times that
    attention = [pair.up.shape[0] for pair in pairs[:3] if pair is not None]
    hidden = attention[0] if attention else present[0].up.shape[0] // MLP_RATIO
    heights = [hidden, hidden, hidden, hidden * MLP_RATIO][: len(pairs)]
    ups = [
        pair.up if pair is not None else present[0].up.new_zeros(height, 0)
        for pair, height in zip(pairs, heights, strict=True)
    ]
    return LowRank(torch.cat([pair.down for pair in present]), torch.block_diag(*ups))  # type: ignore[no-untyped-call]
