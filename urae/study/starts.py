"""What a run of the study trains: adapters that begin from other components than the product's.

The loop trains a LoRA or the minor components. Others begin from a file of initial factors:
principal and random components are subtracted exactly, as the minor ones are; MiCA keeps its up
factor. The reference's form is a LoRA over a base from which B0 A0 is subtracted in bfloat16.
"""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model

from urae import __version__
from urae.adapters.attach import read_factors
from urae.adapters.files import LowRank, merge_minor, read_adapter, write_lora
from urae.adapters.initial import compute_initial, compute_updates, fingerprint_origin
from urae.backbones.devices import pick_device, pick_dtype
from urae.backbones.flux import fetch_model, load_transformer
from urae.backbones.weights import find_attention_linears, open_original_weights
from urae.features.claims import Claims
from urae.study.cells import Training, identify
from urae.train import AdapterConfig

_PEFT = {"principal": "pissa", "mica": "mica"}  # peft's names of what it knows


class Start(NamedTuple):
    """What `TrainConfig` needs to be told of what trains."""

    model: str
    """The base, by name or folder."""
    adapter: AdapterConfig


def prepare_start(training: Training, folder: Path) -> Start:
    """Write what a run starts from, as far as the loop does not know it by itself.

    Args:
        training: The run.
        folder: For the files; one that is there is kept. Several processes may share it.
    """
    over = (training.over.name,) if training.over else ()
    name, rank = training.adapter, training.rank
    if name == "lora" or name == "minor":
        return Start(training.model.name, AdapterConfig(name, rank, over))
    what = {"model": training.model.revision, "over": training.over and training.over.revision}
    key = identify({**what, "adapter": name, "rank": rank, "seed": training.seed})
    path = folder / f"{key}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / identify({**what, "rank": rank})
    with Claims(folder / "lock") as claims, claims.claim("start", wait=True):  # one at a time
        if name == "bf16 residual":
            assert not over
            _write_residual(training.model.name, rank, base, path)
        elif not path.is_file():
            _write_components(training, path)
    if name == "bf16 residual":
        return Start(str(base), AdapterConfig("lora", rank, init=str(path)))
    if name == "mica":
        return Start(
            training.model.name, AdapterConfig("lora", rank, over, str(path), trains="down")
        )
    return Start(training.model.name, AdapterConfig("minor", rank, over, str(path)))


def _write_components(training: Training, path: Path) -> None:
    """Write the factors that principal, random or MiCA's components begin with."""
    transformer = _load(training.model.name).float()
    names = find_attention_linears(transformer)
    weights = open_original_weights(transformer, names)
    files = [read_adapter(training.over.name)] if training.over else []
    updates = compute_updates(files, lambda layers: weights, device=pick_device())
    origin = fingerprint_origin(weights, updates)
    for update in updates:  # the components are those of base and adapter together
        for name, pair in update.items():
            transformer.get_submodule(name).weight.data += pair.up.float() @ pair.down.float()
    if training.adapter in _PEFT:
        layers = _ask_peft(transformer, names, training.rank, _PEFT[training.adapter])
    else:
        rng = random.Random(training.seed)
        layers = {name: _draw(weights[name](), training.rank, rng) for name in names}
    metadata = {"urae.version": __version__, "urae.rank": str(training.rank)}
    if training.adapter == "mica":
        write_lora(path, layers, metadata)
        return
    doubled = {name: merge_minor(pair, pair) for name, pair in layers.items()}
    write_lora(path, doubled, {**metadata, "urae.kind": "minor", "urae.origin_hash": origin})


def _ask_peft(
    transformer: FluxTransformer2DModel, names: list[str], rank: int, initial: Any
) -> Mapping[str, LowRank]:
    """Let peft find the factors that an adapter begins with.

    Its PiSSA takes them off the weights, which is not exact below float32: the factors alone are
    taken from it.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=initial)
    inject_adapter_in_model(config, transformer, "default")
    return {
        name: LowRank(pair.down.detach(), pair.up.detach())
        for name, pair in read_factors(transformer, "default").items()
    }


def _draw(weight: torch.Tensor, rank: int, rng: random.Random) -> LowRank:
    """Return some of a weight's singular components, drawn at random."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    chosen = rng.sample(range(len(values)), rank)
    roots = values[chosen].sqrt()
    down, up = roots[:, None] * right[chosen], left[:, chosen] * roots
    return LowRank(down.float(), up.float())


def _write_residual(model: str, rank: int, base: Path, path: Path) -> None:
    """Write B0 and A0 as a LoRA, and the base less their product, in bfloat16."""
    if path.is_file() and base.is_dir():
        return
    transformer = _load(model).bfloat16()
    weights = open_original_weights(transformer, find_attention_linears(transformer))
    layers = compute_initial(weights, [], rank, device=pick_device())
    write_lora(path, layers, {"urae.version": __version__, "urae.rank": str(rank)})
    for name, pair in layers.items():
        weight: Any = transformer.get_submodule(name).weight
        weight.data = (weight.data.float() - pair.up @ pair.down).bfloat16()
    partial = base.with_name(f"{base.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    leave_out = shutil.ignore_patterns("transformer")
    shutil.copytree(fetch_model(model), partial, ignore=leave_out)
    transformer.save_pretrained(partial / "transformer")
    if base.is_dir():
        shutil.rmtree(partial)
    else:
        partial.rename(base)


def _load(model: str) -> FluxTransformer2DModel:
    """Load a base's transformer on the CPU, rounded as it is for training."""
    return load_transformer(fetch_model(model), dtype=pick_dtype(pick_device()))
