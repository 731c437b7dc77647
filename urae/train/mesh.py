"""Several processes in one run: who has which samples, which part of a picture, which weights.

The ranks form a mesh of data x context. Ranks of one context share their samples and split each
picture's tokens between them (Ulysses, arXiv:2309.14509, by diffusers' hooks); the others have
samples of their own. The frozen base may lie in shards over a host's ranks (FSDP2); what trains is
small, and every rank has the whole of it.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from urae.backbones.context_parallel import build_mesh as build_context
from urae.backbones.context_parallel import list_degrees, share_forwards
from urae.backbones.flux import build_meta_transformer
from urae.features.dataset import Sample
from urae.generate.speed import list_blocks
from urae.geometry import num_image_tokens
from urae.resolution import ResolutionPolicy
from urae.train.config import TrainConfig
from urae.train.preview import count_text_tokens

_HARMLESS = (
    r"FSDP2-wrapped module .* returned a view tensor",  # which FLUX does nothing in place to
    r"`torch.distributed._functional_collectives.all_gather_tensor` is deprecated",  # diffusers'
)


@dataclass(frozen=True)
class Mesh:
    """The place of this process among those of the run."""

    device: torch.device
    rank: int
    num_ranks: int
    context_parallel: int
    """Ranks that share a picture; they stand beside each other, so mostly on one host."""

    @property
    def data_rank(self) -> int:
        """Which share of the samples is this rank's."""
        return self.rank // self.context_parallel

    @property
    def num_data_ranks(self) -> int:
        """Number of shares of the samples."""
        return self.num_ranks // self.context_parallel

    def share(self, count: int) -> list[int]:
        """Number what this rank has to do of `count` things.

        All ranks get equally many, as collectives in the model want: the last may come twice.
        """
        turns = range(0, count, self.num_data_ranks)
        return [min(first + self.data_rank, count - 1) for first in turns]

    def build_shards(self) -> DeviceMesh:
        """Build the mesh of the ranks on this host: weights do not travel between hosts."""
        local = count_local_ranks(self.num_ranks)
        shape = (self.num_ranks // local, local)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("host", "shard"))["shard"]


def build_mesh(config: TrainConfig, accelerator: Accelerator) -> Mesh:
    """Find the place of this process."""
    return Mesh(
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        config.context_parallel,
    )


def count_local_ranks(num_ranks: int) -> int:
    """Count the ranks of this host, as the launcher says; all of them where it says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))


def check_mesh(
    config: TrainConfig,
    samples: Sequence[Sample],
    model_path: Path,
    policy: ResolutionPolicy,
    num_ranks: int,
) -> None:
    """Check, before weights load, that a run can be split as its config says.

    Args:
        config: Of the run.
        samples: All of the run, those held out too.
        model_path: Of the base.
        policy: The one in effect.
        num_ranks: Processes of the run.

    Raises:
        ValueError: Says what does not divide, and what would.
    """
    if config.shard:
        _check_shard(config, num_ranks)
    if config.context_parallel == 1:
        return
    if policy.attention == "local":
        raise ValueError(
            f"context_parallel {config.context_parallel} cannot be combined with local attention, "
            "for which each rank would need its neighbours' keys; set --context-parallel 1, or a "
            "policy with full attention"
        )
    counts = _count_what_is_split(config, samples, model_path)
    _check_divides(config.context_parallel, {"the number of processes": num_ranks, **counts})


def _count_what_is_split(
    config: TrainConfig, samples: Sequence[Sample], model_path: Path
) -> dict[str, int]:
    """Count, by what it is, all that the ranks of a context take equal parts of."""
    counts = {
        "the base's attention heads": build_meta_transformer(model_path).config.num_attention_heads,
        "the text tokens of the features": samples[0].text_tokens,
    }
    for sample in samples:
        what = f"the tokens of {sample.stem}, {sample.width} x {sample.height} pixels"
        counts[what] = num_image_tokens(sample.height, sample.width)
    if config.preview_prompts:
        counts["the tokens of a preview"] = num_image_tokens(config.resolution, config.resolution)
        counts["the text tokens of a preview"] = count_text_tokens(model_path)
    return counts


def _check_divides(degree: int, counts: dict[str, int]) -> None:
    fitting = ", ".join(map(str, list_degrees(*counts.values())))
    for what, count in counts.items():
        if count % degree:
            raise ValueError(
                f"context_parallel {degree} does not divide {count}, {what}; this run can have "
                f"{fitting} (from 2048 pixels up, `urae cache` makes sizes for 2, 4 and 8)"
            )


def _check_shard(config: TrainConfig, num_ranks: int) -> None:
    local = count_local_ranks(num_ranks)
    if local == 1 or num_ranks % local:
        raise ValueError(
            f"shard spreads the base over the processes of a host, of which there are {local} "
            f"here and {num_ranks} in all; start two or more on each host, the same number on "
            "all, with torchrun or accelerate launch, or leave out shard"
        )
    if config.compile:
        raise ValueError(
            "compile true cannot be combined with shard, which gathers each block's weights as "
            "it is called; leave one of the two out"
        )


def distribute(
    transformer: FluxTransformer2DModel,
    factors: Sequence[nn.Parameter],
    config: TrainConfig,
    mesh: Mesh,
) -> None:
    """Bring a transformer to where it trains, and make all ranks' adapters equal.

    Args:
        transformer: With its adapters; on the CPU if it is to be sharded, so that the device never
            has to hold the whole of it.
        factors: The trained adapter's, those that stay too; they are whole on each rank.
        config: Of the run.
        mesh: The ranks.
    """
    for factor in factors:
        factor.data = factor.data.to(mesh.device)
    if config.shard:
        shards, ignored = mesh.build_shards(), set(factors)
        for module in (*list_blocks(transformer), transformer):
            fully_shard(module, mesh=shards, ignored_params=ignored)
    if config.context_parallel > 1:
        share_forwards(transformer, build_context(mesh.context_parallel, mesh.device))
    for harmless in _HARMLESS:
        warnings.filterwarnings("ignore", harmless)
    if mesh.num_ranks > 1:
        for tensor in (*factors, *transformer.buffers()):  # minor components are found by each
            distributed.broadcast(tensor.data, src=0)


def sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all ranks, in one piece.

    Each has that of its samples' part of the step's loss, and of its own tokens alone: over data
    and over contexts alike they add up.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters)
    flat = accelerator.reduce(torch.cat([each.flatten() for each in gradients]), "sum")
    parts = flat.split([each.numel() for each in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
