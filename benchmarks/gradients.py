"""Gradients of two GPUs against those of one, in float32, on the miniature.

`h200.py` starts this file in one process and in two; each run takes a step and keeps its gradients.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench import ROOT, Bench, torchrun

sys.path.insert(0, str(ROOT))

MODEL, SIDE = "miniature-dev", 512
MODES: dict[str, dict[str, Any]] = {
    "data parallel": {},
    "context parallel": {"context_parallel": 2},
    "base in shards": {"shard": True},
    "context parallel, base in shards": {"context_parallel": 2, "shard": True},
}


def measure_gradients(bench: Bench) -> dict[str, Any]:
    """Compare the gradients of minor components over a LoRA, in each way to share the work."""
    from training import write_features

    from urae.backbones.flux import fetch_model

    data = bench.work / "features-miniature"
    write_features(fetch_model(MODEL), data, SIDE // 8)
    alone = {batches: run(bench, data, batches=batches) for batches in (1, 2)}
    found = {}
    for mode, settings in MODES.items():
        wanted = alone[1 if "context_parallel" in settings else 2]
        two = run(bench, data, gpus=2, settings=settings)
        found[mode] = {
            "matrices": len(wanted),
            "difference": max(
                float((one - other).norm() / other.norm())
                for one, other in zip(two, wanted, strict=True)
            ),
        }
    return found


def run(
    bench: Bench,
    data: Path,
    *,
    gpus: int = 1,
    batches: int = 1,
    settings: dict[str, Any] | None = None,
) -> list[torch.Tensor]:
    """Train a step on so many GPUs, of so many batches each, and return what it leaves."""
    output = bench.work / "gradients"
    shutil.rmtree(output, ignore_errors=True)
    start = [sys.executable] if gpus == 1 else torchrun(gpus)
    words = json.dumps({"gradient_accumulation": batches, **(settings or {})})
    environment = dict(os.environ)
    if bench.device.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    subprocess.run(
        [*start, __file__, str(data), str(output), words], check=True, cwd=ROOT, env=environment
    )
    found: list[torch.Tensor] = torch.load(output / "gradients.pt")
    return found


def main() -> None:
    """Take one step in one process of the run; the first keeps its gradients."""
    import urae.train.attention
    import urae.train.loop
    from urae.train import AdapterConfig, OptimizerConfig, TrainConfig, train
    from urae.train.state import TrainingState

    data, output, settings = sys.argv[1:]
    kept: list[torch.Tensor] = []
    advance = TrainingState.advance

    def keep(self: TrainingState, num_batches: int) -> None:
        for parameter in self.adapter.parameters:
            assert parameter.grad is not None
            kept.append(parameter.grad.detach().cpu().clone())
        advance(self, num_batches)

    TrainingState.advance = keep  # type: ignore[method-assign]
    # bfloat16 of a GPU would hide what is compared; of diffusers' attentions in float32 one alone
    # sees the keys of other ranks
    urae.train.loop.pick_dtype = lambda device: torch.float32  # type: ignore[attr-defined]
    urae.train.attention.CANDIDATES = ("native",)
    config = TrainConfig(
        model=MODEL,
        data_dir=Path(data),
        output_dir=Path(output),
        resolution=SIDE,
        steps=1,
        memory="resident",
        compile=False,
        adapter=AdapterConfig("minor", 16, over=("miniature-2k",)),
        optimizer=OptimizerConfig("adamw", lr=1e-4),
        **json.loads(settings),
    )
    train(config)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(kept, Path(output) / "gradients.pt")


if __name__ == "__main__":
    main()
