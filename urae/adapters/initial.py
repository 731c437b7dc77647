"""B0 and A0 of a minor adapter: the minor components of the very base it is applied to."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from urae.adapters.files import AdapterFile, LowRank, merge_minor
from urae.adapters.minor import minor_components
from urae.adapters.sources import find_local_adapter
from urae.storage import digest_file

logger = logging.getLogger(__name__)

Weights = Mapping[str, Callable[[], Tensor]]
OpenWeights = Callable[[Sequence[str]], Weights]
Progress = Callable[[int, int], None]

_ROW_STRIDE = 16


def fingerprint_origin(weights: Weights, over: Sequence[Mapping[str, LowRank]]) -> str:
    """Identify a base and the adapters under a minor adapter by their numbers.

    The same for a base held in bfloat16 and in float32, whatever file it came from: the base's
    numbers count as bfloat16 has them.

    Args:
        weights: The base's matrices by layer.
        over: Factors of the adapters that come before the minor one.

    Returns:
        SHA-256 of every 16th row of each matrix and of the factors, 64 hex digits.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name}\n".encode())
        digest.update(_float_bytes(weights[name]()[::_ROW_STRIDE].bfloat16()))
        for layers in over:
            if name in layers:
                digest.update(_float_bytes(layers[name].down))
                digest.update(_float_bytes(layers[name].up))
    return digest.hexdigest()


def _float_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().contiguous().cpu().numpy().tobytes()


def compute_initial(
    weights: Weights,
    over: Sequence[Mapping[str, LowRank]],
    rank: int,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, LowRank]:
    """Compute B0 and A0 from base + earlier adapters, summed in float32.

    Args:
        weights: The base's original matrices by layer.
        over: Factors of the adapters that come before, such as the 2K LoRA.
        rank: Components a matrix.
        device: Where to solve.
        progress: Called with matrices done and in all.
    """

    def summed(name: str) -> Callable[[], Tensor]:
        def load() -> Tensor:
            weight = weights[name]()
            for layers in over:
                if name in layers:
                    pair = layers[name]
                    up, down = pair.up.to(weight.device), pair.down.to(weight.device)
                    weight = weight + up.float() @ down.float()
            return weight

        return load

    splits = minor_components(
        {name: summed(name) for name in weights}, rank, device=device, progress=progress
    )
    return {name: LowRank(split.down, split.up) for name, split in splits.items()}


def compute_updates(
    files: Sequence[AdapterFile],
    open_weights: OpenWeights | None,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> list[Mapping[str, LowRank]]:
    """Return each adapter's update as plain factors, in order.

    A minor adapter becomes one update of twice its rank, B A - B0 A0, with B0 and A0 of the base
    plus the adapters before it.

    Args:
        files: In the order in which they are applied.
        open_weights: Gives the original matrices of some layers; None takes B0 and A0 from the
            files, whatever base they come from.
        device: Where to solve.
        progress: Called with matrices done and in all.

    Raises:
        ValueError: If a minor adapter lacks the adapter it was trained over, or its B0 and A0.
        FileNotFoundError: If the original weights are needed and missing.
    """
    check_order(files)
    updates: list[Mapping[str, LowRank]] = []
    for file in files:
        if file.variant is not None:
            raise ValueError(
                f"{file.path} is a {file.kind} adapter, which is not a sum of low-rank factors, "
                "so no plain LoRA has the same effect; use it as it is, without other adapters"
            )
        if file.kind == "lora":
            updates.append(file.layers)
            continue
        initial = find_initial(file, updates, open_weights, device=device, progress=progress)
        updates.append(
            {name: merge_minor(pair, initial[name]) for name, pair in file.layers.items()}
        )
    return updates


def stack_updates(updates: Sequence[Mapping[str, LowRank]]) -> dict[str, LowRank]:
    """Sum updates by layer into one of the summed rank, in float32."""
    layers: dict[str, LowRank] = {}
    for update in updates:
        for name, pair in update.items():
            down, up = pair.down.float(), pair.up.float()
            if name in layers:
                down = torch.cat([layers[name].down, down])
                up = torch.cat([layers[name].up, up], dim=1)
            layers[name] = LowRank(down, up)
    return layers


def check_order(files: Sequence[AdapterFile]) -> None:
    """Refuse an adapter of ours without the one that it was trained over.

    DoRA, LoKr and OFT go with no other.

    Raises:
        ValueError: Names them.
    """
    for index, file in enumerate(files):
        if file.variant is not None and len(files) > 1:
            raise ValueError(
                f"{file.path} is a {file.kind} adapter, which cannot be combined with other "
                "adapters; leave the others out"
            )
        trained_over = file.metadata.get("urae.over")
        if not trained_over:
            continue
        if index == 0:
            raise ValueError(
                f"{file.kind} adapter {file.path} was trained over {trained_over}; give both, "
                "with that one first"
            )
        # a plain LoRA is a sum: what comes between changes nothing of it
        before = files[index - 1 : index] if file.kind == "minor" else files[:index]
        if all(_is_other(trained_over, earlier.path) for earlier in before):
            logger.warning(
                "%s adapter %s was trained over %s but is placed after %s, where its effect "
                "differs; put it directly after %s",
                file.kind, file.path, trained_over, files[index - 1].path, trained_over,
            )  # fmt: skip


def _is_other(name: str, path: Path) -> bool:
    """Tell whether a file is surely not the adapter of a name; one that is not here may be any."""
    try:
        found = find_local_adapter(name)
    except (ValueError, OSError):  # something of that name is here, but no adapter
        return False
    return found is not None and digest_file(found) != digest_file(path)


def find_initial(
    adapter: AdapterFile,
    over: Sequence[Mapping[str, LowRank]],
    open_weights: OpenWeights | None,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Mapping[str, LowRank]:
    """Take a minor adapter's B0 and A0 from its file, or compute them if it has another base.

    Arguments and errors are those of `compute_updates`; `over` are the updates before this one.
    """
    if open_weights is None:
        if adapter.initial is None:
            raise ValueError(
                f"{adapter.path} does not hold its B0 and A0; name the base it was trained on "
                "(--model), and put its 2K LoRA before it"
            )
        if len(over) > 1:
            logger.warning(
                "%d adapters come before minor adapter %s, whose B0 and A0 were computed over "
                "the last one only; name the base (--model) to compute them over all, as "
                "urae.adapt does",
                len(over), adapter.path,
            )  # fmt: skip
        return adapter.initial
    if not over and adapter.initial is None:
        logger.warning(
            "minor adapter %s has no adapter before it; the reference's 4K file belongs after "
            "the 2K LoRA: [lora_2k, minor_4k]",
            adapter.path,
        )
    weights = open_weights(list(adapter.layers))
    if adapter.initial is not None:
        if adapter.origin_hash == fingerprint_origin(weights, over):
            return adapter.initial
        logger.info("%s was trained on another base; computing its B0 and A0", adapter.path)
    rank = next(iter(adapter.layers.values())).down.shape[0]
    return compute_initial(weights, over, rank, device=device, progress=progress)
