"""One transformer forward on two GPUs against one, in the same processes.

`h200.py` starts this file in two processes; each measures alone, then both together.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench import ROOT, Bench, find_attention, random_inputs, time_forwards, torchrun
from forward import load

sys.path.insert(0, str(ROOT))


def measure_forward_two_gpus(bench: Bench) -> dict[str, Any]:
    """Time forwards as `urae generate` runs them, with the 2K LoRA and compiled blocks."""
    figures = bench.work / "two_gpus.json"
    where = [bench.shape, str(bench.output), str(bench.work), str(figures)]
    subprocess.run([*torchrun(2), __file__, *where], check=True, cwd=ROOT)
    result: dict[str, Any] = json.loads(figures.read_text())
    return result


def measure_trained(bench: Bench) -> dict[str, Any]:
    """Compare two GPUs with one in bfloat16 on the adapted miniature, by size and noise level."""
    figures = bench.work / "trained.json"
    script = Path(__file__).with_name("trained.py")
    subprocess.run([*torchrun(2), str(script), str(figures)], check=True, cwd=ROOT)
    result: dict[str, Any] = json.loads(figures.read_text())
    return result


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference by that of `other`."""
    return float((one - other).float().norm() / other.float().norm())


@torch.no_grad()
def main() -> None:
    """Measure in one of two processes; the first writes the figures."""
    import urae
    from urae.backbones.context_parallel import build_mesh, context_parallel
    from urae.backbones.flux import predict_velocity
    from urae.backbones.ranks import join_ranks

    shape, output, work, figures = sys.argv[1:]
    bench = Bench(shape, Path(output), Path(work))
    with join_ranks(bench.device) as ranks:
        pipe = load(bench)
        urae.adapt(pipe, bench.lora)
        mesh = build_mesh(2, ranks.device)
        found: dict[str, Any] = {}
        for side, count in ((2048, 5), (4096, 3)):
            inputs = random_inputs(pipe.transformer, bench, side)
            urae.optimize(pipe, speed=None)
            plain = predict_velocity(pipe.transformer, *inputs, 3.5)
            urae.optimize(pipe)
            alone = time_forwards(pipe.transformer, bench, side, count)
            wanted = predict_velocity(pipe.transformer, *inputs, 3.5)
            attention = find_attention(pipe.transformer)
            ranks.wait()
            urae.optimize(pipe)  # anew, so that attention is chosen for half of the heads
            with context_parallel(pipe.transformer, mesh):
                together = time_forwards(pipe.transformer, bench, side, count)
                velocity = 1 * predict_velocity(pipe.transformer, *inputs, 3.5)
                shared_attention = find_attention(pipe.transformer)
            found[str(side)] = {
                "one": statistics.median(alone),
                "two": statistics.median(together),
                "all_one": alone,
                "all_two": together,
                "difference": relative_difference(velocity, wanted),
                "rounding": relative_difference(plain, wanted),
                "attention": [attention, shared_attention],
            }
        if ranks.rank == 0:
            Path(figures).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
