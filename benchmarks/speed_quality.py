"""Measure what each approximation costs in quality, against `exact` from the same noises.

    python benchmarks/speed_quality.py --adapter my_2k.safetensors --adapter my_4k --side 1024

Pictures of held-out captions are checked against them, with and without each candidate: a part of
`urae.optimize` at a strength, or several joined by `+`. It enters a preset when the lower end of
the 95% interval of the difference is above what that preset may lose. PSNR to the exact picture and
the distance of spectra are told beside.

Each candidate writes its own JSON after every batch, and a run that was broken off goes on from
there; `results.md` is made anew from what is there. Exact pictures are kept beside, as PNG; with
--against they are those of another folder, so that adapters are compared, this run's `exact` too.
Step caches that decide by what they see decide for a batch at once: --batch 1 is what a user of
single pictures gets. Several processes can share a GPU: one with `--candidates exact`, the others
with a candidate each and --beside, which wait for exact pictures that are not there yet.
"""

import argparse
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from measure import describe_machine, find_commit, synchronize
from report import table
from torch import Tensor

import urae
from urae.backbones.devices import pick_device
from urae.evaluate.spectrum import compare_spectra, radial_spectrum
from urae.generate.parts import BARS, resolve_parts
from urae.miniature.check import check_scene
from urae.miniature.photograph import decode_picture, encode_picture
from urae.miniature.processes import start_processes
from urae.miniature.score import default_sampling, draw_scenes, held_out_scenes, load_scored
from urae.miniature.world import Scene
from urae.storage import write_atomic

EXACT = "exact"
CANDIDATES = (
    "8bit",
    "local-attention",
    *(f"first-block-cache={strength}" for strength in (0.05, 0.1, 0.2)),
    *(f"mag-cache={strength}" for strength in (0.06, 0.12, 0.24)),
    *(f"taylorseer-cache={strength}" for strength in (3, 5, 7)),
    *(f"progressive={share}" for share in (0.2, 0.35, 0.5)),
)
ON_GPU = ("fp8", "4bit")
_MAX_WAITING = 16  # batches that are made and not checked yet
_MAX_WAIT_SECONDS = 300  # for an exact picture
_MAX_PSNR = 99.0  # of equal pictures
_Z = 1.959964
_LEAST_SHARE = 0.5  # of exact pictures that pass, for a loss to show


@dataclass(frozen=True)
class Study:
    """What is compared, and where it is kept."""

    output: Path
    model: str
    adapters: tuple[str, ...]
    side: int
    num_captions: int
    num_seeds: int
    batch: int
    steps: int
    guidance_scale: float
    first_caption: int = 0
    against: Path | None = None
    """The folder whose exact pictures count; None: `output`."""

    @property
    def jobs(self) -> list[tuple[Scene, int]]:
        """All captions with the first noise, then with the next."""
        scenes = held_out_scenes(self.num_captions, self.first_caption)
        return [(scene, number) for number in range(self.num_seeds) for scene in scenes]

    def describe(self) -> dict[str, Any]:
        """Return what figures must share to be compared."""
        return {
            **{name: getattr(self, name) for name in ("model", "side", "batch", "steps")},
            "adapters": list(self.adapters),
            "guidance_scale": self.guidance_scale,
            "num_captions": self.num_captions,
            "num_seeds": self.num_seeds,
            **({"first_caption": self.first_caption} if self.first_caption else {}),
            **({"against": str(self.against)} if self.against else {}),
        }

    def picture(self, number: int) -> Path:
        """Return the file of an exact picture."""
        return (self.against or self.output) / EXACT / f"{number:05d}.png"

    def read_exact(self) -> dict[str, Any] | None:
        """Read what counts as exact, as far as it is there.

        Raises:
            ValueError: If it is of another study; in another folder only adapters may differ.
            FileNotFoundError: If another folder has none.
        """
        path = (self.against or self.output) / f"{EXACT}.json"
        if not path.exists():
            if self.against is None:
                return None
            raise FileNotFoundError(f"{path} is missing; run --candidates exact there first")
        record: dict[str, Any] = json.loads(path.read_text())
        may_differ = dict.fromkeys(("adapters", "against") if self.against else ())
        if {**record["study"], **may_differ} != {**self.describe(), **may_differ}:
            raise ValueError(
                f"{path} is of another study ({record['study']}); with --against only adapters may "
                "differ, else choose another --output, or delete it"
            )
        return record if record["passed"] else None


def measure(pipe: FluxPipeline, study: Study, name: str, pool: ProcessPoolExecutor) -> None:
    """Make a candidate's pictures, from where its file ends, and write what they are like."""
    path, jobs = study.output / f"{name}.json", study.jobs
    record = read_record(path, study, name)
    done = len(record["passed"])
    if done == len(jobs):
        return
    print(f"== {name}, {done} of {len(jobs)} done", flush=True)
    urae.optimize(pipe, parts=[] if name == EXACT else name.split("+"))
    draw(pipe, study, jobs[: study.batch], warm_up=True)  # compiles; MagCache measures its ratios
    waiting: deque[Future[Any]] = deque()
    for start in range(done, len(jobs), study.batch):
        some = jobs[start : start + study.batch]
        synchronize()
        began = time.perf_counter()
        pictures = draw(pipe, study, some)
        synchronize()
        seconds = time.perf_counter() - began
        paths = [study.picture(start + k) for k in range(len(some))]
        scenes = [scene for scene, _ in some]
        keep = name == EXACT and study.against is None
        waiting.append(pool.submit(examine, pictures, scenes, paths, seconds, keep))
        while waiting and (waiting[0].done() or len(waiting) > _MAX_WAITING):
            add(record, *waiting.popleft().result())
            write_atomic(path, json.dumps(record).encode())
    for each in waiting:
        add(record, *each.result())
    write_atomic(path, json.dumps(record).encode())


def draw(
    pipe: FluxPipeline, study: Study, jobs: Sequence[tuple[Scene, int]], *, warm_up: bool = False
) -> list[Tensor]:
    """Generate a batch of pictures, of the captions' own noises."""
    other = 500 if warm_up else 0  # another noise, the same shapes
    pictures = draw_scenes(
        pipe,
        [scene for scene, _ in jobs],
        [number + other for _, number in jobs],
        side=study.side,
        steps=study.steps,
        guidance_scale=study.guidance_scale,
    )
    return list(pictures)


def read_record(path: Path, study: Study, name: str) -> dict[str, Any]:
    """Read what a candidate has so far, or begin.

    Raises:
        ValueError: If the file is of another study.
    """
    if not path.exists():
        return {
            "candidate": name,
            "study": study.describe(),
            "machine": describe_machine(),
            "commit": find_commit(),
            **{key: [] for key in ("passed", "failed", "psnr", "seconds", "spectrum")},
        }
    record: dict[str, Any] = json.loads(path.read_text())
    if record["study"] != study.describe():
        raise ValueError(
            f"{path} is of another study ({record['study']}); choose another --output, or delete it"
        )
    return record


def examine(
    pictures: list[Tensor], scenes: list[Scene], exact: list[Path], seconds: float, keep: bool
) -> tuple[list[list[str]], list[float], list[float], Tensor]:
    """Check a batch, and compare it with the exact pictures, which it is where `keep` says so.

    Returns:
        What of its caption each lacks, its PSNR in dB, the seconds of each, the sum of their
        spectra.
    """
    if keep:
        exact[0].parent.mkdir(exist_ok=True)
        for picture, path in zip(pictures, exact, strict=True):
            write_atomic(path, encode_picture(picture, "PNG"))
    for path in exact:
        wait_for(path)
    others = [decode_picture(path.read_bytes()) for path in exact]
    reports = [check_scene(p.numpy(), s) for p, s in zip(pictures, scenes, strict=True)]
    failed = [[part for part, holds in asdict(each).items() if not holds] for each in reports]
    psnr = [compute_psnr(one, other) for one, other in zip(pictures, others, strict=True)]
    spectrum = radial_spectrum(torch.stack(pictures).float() / 255).sum(0)
    return failed, psnr, [seconds / len(pictures)] * len(pictures), spectrum


def wait_for(path: Path) -> None:
    """Wait for a picture that another process is to make.

    Raises:
        FileNotFoundError: If it does not come.
    """
    for _ in range(_MAX_WAIT_SECONDS):
        if path.exists():
            return
        time.sleep(1)
    raise FileNotFoundError(f"{path} does not come; run --candidates exact first, or beside this")


def compute_psnr(picture: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio of 8-bit pictures in dB, 99 for equal ones."""
    error = float((picture.float() - other.float()).square().mean())
    return min(_MAX_PSNR, 10 * math.log10(255**2 / error)) if error else _MAX_PSNR


def add(
    record: dict[str, Any],
    failed: list[list[str]],
    psnr: list[float],
    seconds: list[float],
    spectrum: Tensor,
) -> None:
    """Add a batch to a candidate's record."""
    record["passed"] += [not parts for parts in failed]
    record["failed"] = [*record.get("failed", []), *failed]  # older files have none
    record["psnr"] += [round(each, 2) for each in psnr]
    record["seconds"] += [round(each, 4) for each in seconds]
    before = torch.tensor(record["spectrum"] or [0.0] * len(spectrum))
    record["spectrum"] = (before + spectrum).tolist()


def compare(exact: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Compare the pictures that both records have; the spectra are sums, so only of equally many.

    The pictures of one caption are not independent, so that the interval is that of the mean of
    the captions' differences. Half a caption that gained, half a one that lost and one that did
    neither are added, as to pairs in Agresti and Min (Statistics in Medicine 24, 2005), or no
    difference in a few captions would count as proof.
    """
    count = min(len(exact["passed"]), len(other["passed"]))
    num_captions = exact["study"]["num_captions"]
    by_caption: dict[int, list[int]] = {}
    for number in range(count):
        difference = int(other["passed"][number]) - int(exact["passed"][number])
        by_caption.setdefault(number % num_captions, []).append(difference)
    means = [statistics.fmean(each) for each in by_caption.values()]
    total = len(means) + 2
    middle = sum(means) / total
    variance = (sum(each**2 for each in means) + 1) / total - middle**2
    half = _Z * math.sqrt(variance / total)
    equally_many = len(exact["passed"]) == len(other["passed"])
    spectra = [torch.tensor(each["spectrum"]) / len(each["passed"]) for each in (exact, other)]
    return {
        "count": count,
        "share": statistics.fmean(other["passed"][:count]),
        "difference": statistics.fmean(means),
        "low": middle - half,
        "high": middle + half,
        "psnr": statistics.fmean(other["psnr"][:count]),
        "spectrum": float(compare_spectra(*spectra)) if equally_many else None,
        "seconds": statistics.median(other["seconds"][:count]),
        "speedup": statistics.median(exact["seconds"][:count])
        / statistics.median(other["seconds"][:count]),
    }


def write_results(study: Study) -> str:
    """Make `results.md` from the candidates' files, and return it."""
    records = [json.loads(path.read_text()) for path in sorted(study.output.glob("*.json"))]
    found = {record["candidate"]: record for record in records if record["passed"]}
    exact = study.read_exact()
    if exact is None:
        return ""
    rows = [list_row("against" if study.against else EXACT, compare(exact, exact), bar=False)]
    if study.against is None:
        found.pop(EXACT, None)
    rows += [list_row(name, compare(exact, each)) for name, each in found.items()]
    header = ["part", "pictures", "pass", "difference (95%)", "PSNR, dB", "spectrum, dB"]
    lines = table([*header, "s a picture", "times faster", "good enough for"], rows)
    setting = ", ".join(f"{key} {value}" for key, value in study.describe().items())
    if study.against:
        setting += f"; against adapters {exact['study']['adapters']}"
    machines = {(str(each["machine"]), each["commit"]) for each in (exact, *found.values())}
    origin = "; ".join(f"{machine}, commit {commit}" for machine, commit in sorted(machines))
    share = statistics.fmean(exact["passed"])
    if share < _LEAST_SHARE:
        lines += ["", f"**Exact pictures pass in {share:.0%}: the differences say little.**"]
    text = "\n".join(["# Quality of the parts", "", *lines, "", f"{setting}. {origin}", ""])
    write_atomic(study.output / "results.md", text.encode())
    return text


def list_row(name: str, found: dict[str, Any], *, bar: bool = True) -> list[Any]:
    """Lay out one candidate's figures."""
    inside = [each for each, limit in BARS.items() if found["low"] > -limit]
    interval = f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
    figures = [found[key] for key in ("psnr", "spectrum", "seconds", "speedup")]
    share = f"{found['share']:.1%}"
    verdict = (", ".join(inside) or "none") if bar else "-"
    return [name, int(found["count"]), share, interval if bar else "-", *figures, verdict]


def list_candidates(names: Sequence[str], on_gpu: bool, *, beside: bool = False) -> Iterator[str]:
    """Name candidates as their parts say themselves, those that no CPU can run left out.

    Args:
        names: Those that were asked for; none for all.
        on_gpu: Whether this runs on one.
        beside: Whether another process makes the exact pictures.
    """
    if not beside:
        yield EXACT
    for name in names or (*(ON_GPU if on_gpu else ()), *CANDIDATES):
        if name != EXACT:
            yield "+".join(map(str, resolve_parts(None, name.split("+"))))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="miniature-dev")
    parser.add_argument("--adapter", action="append", default=[], help="in order; repeatable")
    parser.add_argument("--candidates", nargs="+", default=[], metavar="PART", help="default: all")
    parser.add_argument("--beside", action="store_true", help="another process makes exact ones")
    parser.add_argument("--against", type=Path, help="folder of another run's exact pictures")
    parser.add_argument("--side", type=int, default=1024, help="pixels; the miniature's 4K")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first held-out caption")
    parser.add_argument("--seeds", type=int, default=3, help="pictures a caption")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time")
    parser.add_argument("--steps", type=int, help="default: the miniature's")
    parser.add_argument("--guidance", type=float, help="default: the miniature's")
    parser.add_argument("--workers", type=int, default=4, help="processes that check pictures")
    parser.add_argument("--output", type=Path, default=Path("runs/speed-quality"))
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, the exact pictures first."""
    arguments = parse_arguments()
    device = pick_device()
    on_gpu = device.type == "cuda"
    names = list(list_candidates(arguments.candidates, on_gpu, beside=arguments.beside))
    pipe = load_scored(model=arguments.model)
    urae.adapt(pipe, arguments.adapter)
    steps, guidance_scale = default_sampling(pipe)
    study = Study(
        arguments.output,
        arguments.model,
        tuple(arguments.adapter),
        arguments.side,
        arguments.captions,
        arguments.seeds,
        arguments.batch,
        arguments.steps or steps,
        guidance_scale if arguments.guidance is None else arguments.guidance,
        arguments.first,
        arguments.against,
    )
    study.read_exact()  # refused now rather than after the pictures
    study.output.mkdir(parents=True, exist_ok=True)
    with start_processes(arguments.workers) as pool:
        for name in names:
            measure(pipe, study, name, pool)
            print(write_results(study), flush=True)


if __name__ == "__main__":
    main()
