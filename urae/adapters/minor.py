"""The minor part of a weight: its smallest singular components, found exactly.

For W = U S V^T the 4K stage trains the `rank` smallest components (arXiv:2503.16322, section 3).
They lie about four orders of magnitude below the largest, out of reach of a float32 Gram matrix,
so everything here runs in float64. Applying W^-1 makes the small components the dominant ones:
one LU factorisation, then a block Krylov space of (W^T W)^-1, whose best `rank` directions are read
off by Rayleigh-Ritz. The result is accepted only if W v = s u and W^T u = s v hold with orthonormal
vectors; otherwise, and for weights this cannot serve, a full float64 SVD answers.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from urae.content_cache import ContentCache, content_key, find_cache_dir

logger = logging.getLogger(__name__)

SOLVER_VERSION = 2  # of cached results: raise it when they change
OVERSAMPLE = 8  # columns of the Krylov block beyond `rank`
FIRST_CHECK, CHECK_EVERY, MAX_STEPS = 8, 4, 28  # in steps of two triangular solves each
TOLERANCE = 1e-8  # residual relative to the largest component kept
EPSILON = torch.finfo(torch.float64).eps


class MinorSplit(NamedTuple):
    """Factors of a weight's minor part, in float32; the part itself is `up @ down`.

    Component i is row i of `down` and column i of `up`, in the order of an SVD: the smallest
    singular value last. Each row's largest entry by magnitude is positive.
    """

    down: Float[Tensor, "rank in"]
    """sqrt(S_r) V_r^T."""

    up: Float[Tensor, "out rank"]
    """U_r sqrt(S_r)."""


class _Triplets(NamedTuple):
    """Singular triplets in float64, smallest first."""

    left: Float[Tensor, "out rank"]
    values: Float[Tensor, "rank"]
    right: Float[Tensor, "in rank"]


def minor_components(
    weights: Mapping[str, Callable[[], Tensor]],
    rank: int,
    *,
    device: torch.device | str | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, MinorSplit]:
    """Split many weights, one in memory at a time, reusing earlier results from disk.

    A cached result is found by the content of the weight, so renamed, moved or re-downloaded
    models hit and changed ones miss. A damaged cache file is recomputed and an unwritable
    folder is no failure; both log a warning.

    Args:
        weights: Functions that load or compute one weight each (out x in) when called.
        rank: Number of components of every weight.
        device: Where to solve; `None` solves where each weight lies.
        cache_dir: Folder of results; `None` is `minor` in the user's cache folder.
        progress: Called after each weight with (weights done, weights in all).

    Returns:
        The split of each weight under its name, on the CPU.

    Raises:
        ValueError: If `rank` is out of range for a weight, or it is not 2-D or not finite.
    """
    cache = ContentCache(cache_dir or find_cache_dir("minor"))
    splits: dict[str, MinorSplit] = {}
    announced = False
    for name, load_weight in weights.items():
        weight = load_weight().detach().float()
        key = content_key(weight, f"minor components, solver {SOLVER_VERSION}, rank {rank}")
        cached = cache.load(key)
        if cached is None and not announced:
            logger.info(
                "computing the minor components of %d matrices; this is done once", len(weights)
            )
            announced = True
        if cached is not None:
            splits[name] = MinorSplit(down=cached["down"], up=cached["up"])
        else:
            try:
                split = split_minor(weight if device is None else weight.to(device), rank)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            splits[name] = MinorSplit(split.down.cpu(), split.up.cpu())
            cache.store(key, splits[name]._asdict())
        if progress is not None:
            progress(len(splits), len(weights))
    return splits


def split_minor(weight: Float[Tensor, "out in"], rank: int) -> MinorSplit:
    """Find the `rank` smallest singular components of a weight.

    The same weight gives the same bits on the same machine. Where singular values tie at the
    boundary, which of them are kept is arbitrary.

    Args:
        weight: Linear weight, any float dtype; the solve runs in float64, on its device
            (on the CPU for devices without float64).
        rank: Number of components, 1 <= rank < min(out, in).

    Returns:
        Float32 factors on the weight's device such that `up @ down` is its minor part.

    Raises:
        ValueError: If `rank` is out of range or `weight` is not 2-D or not finite.
    """
    shape = tuple(weight.shape)
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {shape} but must be 2-D (out x in); pass a matrix")
    if not 1 <= rank < min(shape):
        raise ValueError(
            f"rank {rank} is out of range for a weight of shape {shape}; "
            f"use 1 <= rank <= {min(shape) - 1}"
        )
    solve_device = "cpu" if weight.device.type == "mps" else weight.device
    matrix = weight.detach().to(solve_device).double()  # in this order: mps has no float64
    norm = float(torch.linalg.vector_norm(matrix))
    if not norm < float("inf"):
        raise ValueError(
            f"weight of shape {shape} has Frobenius norm {norm} but must be finite; "
            "check the checkpoint for NaN or infinity"
        )

    triplets = _split_by_inverse_krylov(matrix, rank) or _split_by_full_svd(matrix, rank, norm)
    largest = triplets.right.abs().argmax(dim=0, keepdim=True)
    signs = triplets.right.gather(0, largest).sign()
    roots = triplets.values.sqrt()
    down = (triplets.right * (signs * roots)).mT.flip(0)
    up = (triplets.left * (signs * roots)).flip(1)
    return MinorSplit(
        down=down.float().contiguous().to(weight.device),
        up=up.float().contiguous().to(weight.device),
    )


def _split_by_inverse_krylov(matrix: Float[Tensor, "out in"], rank: int) -> _Triplets | None:
    """Find the minor triplets by repeated solves; `None` where that cannot be trusted.

    The start block is random and wider than `rank`, so it meets every minor direction, however
    often a singular value repeats. Krylov rather than plain inverse iteration: it converges
    where the singular values at the boundary lie within a fraction of a percent.
    """
    size = matrix.shape[0]
    block = rank + OVERSAMPLE
    max_steps = min(MAX_STEPS, size // (2 * block))  # beyond half the size an SVD is as cheap
    if matrix.shape[0] != matrix.shape[1] or max_steps < FIRST_CHECK:
        return None
    # W^T of a contiguous W already has LAPACK's layout.
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix.mT)
    smallest_pivot, largest_pivot = lu.diagonal().abs().aminmax()
    if smallest_pivot <= EPSILON * largest_pivot:
        return None

    # Q and U with orthonormal columns, and R, such that W^-T Q = U R.
    right = matrix.new_empty(max_steps * block, size).mT
    left = torch.empty_like(right)
    factor = matrix.new_zeros(max_steps * block, max_steps * block)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, block, generator=generator, dtype=torch.float64, device="cpu")
    vectors = start.to(matrix.device)
    for step in range(1, max_steps + 1):
        old, new, known = (step - 1) * block, slice((step - 1) * block, step * block), step * block
        right[:, new] = _orthonormalise(vectors, right[:, :old])
        solved = torch.linalg.lu_solve(lu, pivots, right[:, new])
        left[:, new] = _orthonormalise(solved, left[:, :old])
        factor[:known, new] = left[:, :known].mT @ solved
        if step >= FIRST_CHECK and step % CHECK_EVERY == 0:
            # Rayleigh-Ritz: the SVD of R holds 1/s, the smallest s first.
            turn, inverse_values, turn_t = torch.linalg.svd(factor[:known, :known])
            triplets = _Triplets(
                left=left[:, :known] @ turn[:, :rank],
                values=1 / inverse_values[:rank],
                right=right[:, :known] @ turn_t[:rank].mT,
            )
            if _residual(matrix, triplets) <= TOLERANCE * float(triplets.values[-1]):
                return triplets
        vectors = torch.linalg.lu_solve(lu, pivots, left[:, new], adjoint=True)
    return None


def _orthonormalise(
    vectors: Float[Tensor, "size block"], basis: Float[Tensor, "size known"]
) -> Float[Tensor, "size block"]:
    """Return orthonormal columns that extend an orthonormal basis by `vectors`."""
    for _ in range(2):  # twice is enough for orthogonality to rounding
        vectors = vectors - basis @ (basis.mT @ vectors)
    orthonormal: Tensor = torch.linalg.qr(vectors).Q
    return orthonormal


def _split_by_full_svd(matrix: Float[Tensor, "out in"], rank: int, norm: float) -> _Triplets:
    """Find the minor triplets by a full SVD, to the accuracy float64 allows."""
    logger.debug("full float64 SVD of a weight of shape %s", tuple(matrix.shape))
    left, values, right_t = torch.linalg.svd(matrix, full_matrices=False)
    triplets = _Triplets(
        left=left[:, -rank:].flip(1),
        values=values[-rank:].flip(0),
        right=right_t[-rank:].mT.flip(1),
    )
    residual = _residual(matrix, triplets)
    limit = max(matrix.shape) * EPSILON * norm
    if not residual <= limit:
        raise RuntimeError(
            f"SVD of a weight of shape {tuple(matrix.shape)} left a residual of {residual:.1e}, "
            f"above {limit:.1e}; try another device or linear algebra library"
        )
    return triplets


def _residual(matrix: Float[Tensor, "out in"], triplets: _Triplets) -> float:
    """Measure how far W V = U S, W^T U = V S and orthonormal U, V fail, against W itself.

    Returns:
        The largest column norm of the first two, or the drift from orthonormality times the
        largest value of S, whichever is larger: on the scale of a singular value.
    """
    left, values, right = triplets
    identity = torch.eye(len(values), dtype=matrix.dtype, device=matrix.device)
    drift = torch.maximum((left.mT @ left - identity).abs(), (right.mT @ right - identity).abs())
    forward = torch.linalg.vector_norm(matrix @ right - left * values, dim=0)
    backward = torch.linalg.vector_norm(matrix.mT @ left - right * values, dim=0)
    return float(torch.maximum(torch.maximum(forward, backward), drift * values.max()).max())
