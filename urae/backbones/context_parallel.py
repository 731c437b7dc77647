"""One picture on several GPUs: diffusers' context parallelism, put on a transformer and taken off.

Each rank holds a part of the tokens. For attention they exchange tokens for heads (Ulysses), so
that each has all tokens of some heads; everything else is token by token. diffusers' ring attention
is not used: each rank would gather all keys and values and merge partial results, and FLUX's 24
heads are enough for any host.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel, ParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers.hooks.context_parallel import remove_context_parallel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from urae.backbones.attention import active_backend


def list_degrees(*counts: int) -> list[int]:
    """List the numbers of ranks that can share a picture, from 1: those that divide all counts."""
    divided = math.gcd(*counts)
    return [degree for degree in range(1, divided + 1) if divided % degree == 0]


def build_mesh(degree: int, device: torch.device) -> DeviceMesh:
    """Arrange all ranks in groups of neighbours that share pictures; all ranks must call it.

    Args:
        degree: Ranks of a group; divides their number.
        device: Of this rank.

    Returns:
        This rank's group, as diffusers wants it: ring x ulysses.
    """
    shape = (dist.get_world_size() // degree, 1, degree)
    names = ("pictures", "ring", "ulysses")
    return init_device_mesh(device.type, shape, mesh_dim_names=names)["ring", "ulysses"]


@contextmanager
def context_parallel(transformer: FluxTransformer2DModel, mesh: DeviceMesh) -> Iterator[None]:
    """Share each forward of a transformer as `share_forwards` does, and give it back as it was.

    Args:
        transformer: As in `share_forwards`.
        mesh: As in `share_forwards`.

    Raises:
        ValueError: As `share_forwards`.
    """
    share_forwards(transformer, mesh)
    try:
        yield
    finally:
        for holder in (transformer, *transformer.attn_processors.values()):
            holder._parallel_config = None
        remove_context_parallel(transformer, transformer._cp_plan)


def share_forwards(transformer: FluxTransformer2DModel, mesh: DeviceMesh) -> None:
    """Share each forward of a transformer among the ranks of a mesh; all get its whole output.

    It is diffusers' `enable_parallelism`, but for what that cannot do: run without an accelerator,
    and be undone.

    Args:
        transformer: Adapted, compiled, offloaded or none of these, on every rank alike.
        mesh: As `build_mesh` makes it.

    Raises:
        ValueError: If an attention backend is set that would leave the other ranks' keys out.
    """
    processors = list(transformer.attn_processors.values())
    for processor in processors:
        check_backend_can_share(processor._attention_backend)
    degree = mesh["ulysses"].size()
    parts = ContextParallelConfig(ulysses_degree=degree, mesh=mesh)
    config = ParallelConfig(context_parallel_config=parts)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device(mesh.device_type), mesh=mesh)
    apply_context_parallel(transformer, parts, transformer._cp_plan)
    for holder in (transformer, *processors):
        holder._parallel_config = config


def find_degree(transformer: FluxTransformer2DModel) -> int:
    """Return how many ranks share the forwards of a transformer, by Ulysses or in a ring."""
    config = transformer._parallel_config
    parts = None if config is None else config.context_parallel_config
    return 1 if parts is None else int(parts.ring_degree * parts.ulysses_degree)


def supports_context_parallel(backend: str) -> bool:
    """Tell whether one of diffusers' attention backends sees the keys of other ranks."""
    supports: bool = _AttentionBackendRegistry._is_context_parallel_available(
        AttentionBackendName(backend)
    )
    return supports


def check_backend_can_share(backend: str | None = None) -> None:
    """Refuse an attention that does not see other ranks' keys; needs no weights.

    Args:
        backend: One of diffusers' names; None for the process's own.

    Raises:
        ValueError: If it would leave them out.
    """
    name = active_backend() if backend is None else backend
    if not supports_context_parallel(name):
        raise ValueError(
            f"attention backend {AttentionBackendName(name).value} cannot be combined with "
            "several GPUs on one picture; unset DIFFUSERS_ATTN_BACKEND or set it to one that "
            f"can: {', '.join(sorted(_AttentionBackendRegistry._supports_context_parallel))}"
        )
