"""The six questions: what each varies, and which claims its cells decide."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from urae.resolution import ResolutionPolicy
from urae.study.bench import Bench
from urae.study.cells import Cell, Factor

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
TEACHER_STEPS = (24, 8, 4)
RANKS = (4, 16, 64)
NTK_FACTORS: tuple[float | Literal["auto"], ...] = (1.0, 4.0, 10.0, 40.0, "auto")


@dataclass(frozen=True)
class Claim:
    """That some cells score better than others.

    Each cell that has the factors `better` is paired with the one that has `worse` and is otherwise
    the same, seed by seed.
    """

    text: str
    source: str
    """Who says so."""
    better: Mapping[str, Factor]
    worse: Mapping[str, Factor]


@dataclass(frozen=True)
class Question:
    """A table of the study."""

    title: str
    cells: Callable[[Bench], list[Cell]]
    claims: tuple[Claim, ...]
    x: str
    """Factor along the plot's axis."""
    lines: tuple[str, ...]
    """Factors that have a colour for each of their values together."""
    panels: str | None = None
    """Factor with a plot for each value."""


def table_2(bench: Bench) -> list[Cell]:
    """{LoRA, minor} x {synthetic, real} x {guidance 1, guidance 3.5 in training}, at 2K."""
    return [
        bench.trained_2k(
            {"adapter": adapter, "data": bench.teacher_source if taught else "real", "guidance": g},
            adapter=adapter,
            parts=bench.synthetic() if taught else bench.real(),
            guidance_scale=g,
        )
        for adapter in ("lora", "minor")
        for taught in (True, False)
        for g in (1.0, 3.5)
    ]


def synthetic_share(bench: Bench) -> list[Cell]:
    """Share of synthetic pictures x steps of the teacher, at three lengths of one run, at 2K."""
    mixes = [
        (share, "none" if share == 0 else teacher_steps)
        for teacher_steps in TEACHER_STEPS
        for share in SHARES
        if share > 0 or teacher_steps == TEACHER_STEPS[0]
    ]
    return [
        bench.trained_2k(
            {"teacher steps": teacher, "share": share, "steps": length},
            parts=bench.real() if share == 0 else bench.mix(share, int(teacher)),
            at_step=length,
        )
        for share, teacher in mixes
        for length in bench.lengths
    ]


def components(bench: Bench) -> list[Cell]:
    """Which components train x rank, at 4K over the 2K LoRA, on real pictures.

    MiCA trains one factor of two, so it has twice the rank: the parameters are as many.
    """
    return [
        bench.trained_4k(
            {"components": adapter, "rank": rank},
            adapter=adapter,
            rank=2 * rank if adapter == "mica" else rank,
        )
        for adapter in ("lora", "minor", "principal", "random", "mica")
        for rank in RANKS
    ]


def resolution_policy(bench: Bench) -> list[Cell]:
    """Policies of sampling x policy of training (on, off, auto, nothing trained), at 2K."""
    on, off = bench.policy, bench.policy_off
    auto = replace(on, ntk_factor="auto")
    ways: list[ResolutionPolicy] = [
        *(replace(on, ntk_factor=factor) for factor in NTK_FACTORS),
        replace(on, proportional_attention=False),
        replace(on, time_shift=10.0),
        replace(on, time_shift="dynamic"),
        off,
        replace(off, time_shift="dynamic"),
    ]
    few = [on, off, replace(on, time_shift="dynamic"), replace(off, time_shift="dynamic")]
    return [
        *(bench.trained_2k(_name("on", way), policy=on, sampling_policy=way) for way in ways),
        *(bench.trained_2k(_name("off", way), policy=off, sampling_policy=way) for way in few),
        bench.trained_2k(_name("auto", auto), policy=auto, sampling_policy=auto),
        *(bench.untrained_2k(_name("nothing trained", way), way) for way in [*few, auto]),
    ]


def _name(trained: str, way: ResolutionPolicy) -> dict[str, Factor]:
    shift = "static" if way.time_shift is None else way.time_shift
    attention = "on" if way.proportional_attention else "off"
    return {
        "policy in training": trained,
        "NTK factor": way.ntk_factor,
        "proportional attention": attention,
        "shift": shift,
    }


def residual_form(bench: Bench) -> list[Cell]:
    """The exact form of the minor components against the reference's bf16 residual, at 2K."""
    forms: dict[str, Any] = {"exact": "minor", "bf16 residual": "bf16 residual"}
    return [
        bench.trained_2k({"form": form, "data": data}, adapter=adapter, parts=parts)
        for form, adapter in forms.items()
        for data, parts in ((bench.teacher_source, bench.synthetic()), ("real", bench.real()))
    ]


def transfer(bench: Bench) -> list[Cell]:
    """Schnell at 2K: direct, with an adapter trained on dev, with its own; and dev, likewise."""
    dev, schnell = bench.dev, bench.schnell
    return [
        bench.untrained_2k({"base": "schnell", "adapter": "none"}, None, model=schnell),
        bench.trained_2k(
            {"base": "schnell", "adapter": "trained on dev"}, model=dev, sampling_model=schnell
        ),
        bench.trained_2k({"base": "schnell", "adapter": "trained on schnell"}, model=schnell),
        bench.untrained_2k({"base": "dev", "adapter": "none"}, None),
        bench.trained_2k({"base": "dev", "adapter": "trained on dev"}),
    ]


QUESTIONS: dict[str, Question] = {
    "a": Question(
        "LoRA or minor components, synthetic or real data, guidance in training",
        table_2,
        (
            Claim(
                "Training a guidance-distilled base with guidance 1 is better than with 3.5.",
                "paper, section 3.3 and Table 2",
                {"guidance": 1.0},
                {"guidance": 3.5},
            ),
            Claim(
                "At guidance 1, synthetic data of a stronger teacher are better than real data.",
                "paper, Table 2",
                {"data": "synthetic", "guidance": 1.0},
                {"data": "real", "guidance": 1.0},
            ),
            Claim(
                "On synthetic data at guidance 1, minor components are better than a LoRA (FID "
                "27.90 against 29.44; on real data the paper's metrics disagree at 2K).",
                "paper, Table 2",
                {"adapter": "minor", "data": "synthetic", "guidance": 1.0},
                {"adapter": "lora", "data": "synthetic", "guidance": 1.0},
            ),
        ),
        x="adapter",
        lines=("guidance",),
        panels="data",
    ),
    "b": Question(
        "The share of synthetic data, by the teacher's quality",
        synthetic_share,
        (
            Claim(
                "With a good teacher (24 steps), synthetic data alone converge faster than real "
                "data alone, on the mean over the three lengths.",
                "paper, Theorem 1, as we read it",
                {"teacher steps": 24, "share": 1.0},
                {"teacher steps": "none", "share": 0.0},
            ),
            Claim(
                "With a good teacher, half of the data synthetic already helps.",
                "paper, Theorem 1, as we read it",
                {"teacher steps": 24, "share": 0.5},
                {"teacher steps": "none", "share": 0.0},
            ),
            Claim(
                "What synthetic data give depends on the teacher: one of 24 steps is better than "
                "one of 4, over all shares and lengths.",
                "paper, Theorem 1, as we read it",
                {"teacher steps": 24},
                {"teacher steps": 4},
            ),
        ),
        x="steps",
        lines=("share",),
        panels="teacher steps",
    ),
    "c": Question(
        "Which components train at 4K, and how many",
        components,
        (
            *(
                Claim(
                    f"At 4K on real data, minor components are better than {name}, over all ranks.",
                    source,
                    {"components": "minor"},
                    {"components": other},
                )
                for other, name, source in (
                    ("lora", "a LoRA", "paper, section 3.2 and Table 3"),
                    ("principal", "principal ones", "follows from section 3.2 of the paper"),
                    ("random", "random ones", "follows from section 3.2 of the paper"),
                    ("mica", "MiCA's", "asked when the figures were there"),
                )
            ),
            Claim(
                "At 4K on real data, rank 4 is better than 64, over all components.",
                "asked when the figures were there",
                {"rank": 4},
                {"rank": 64},
            ),
        ),
        x="rank",
        lines=("components",),
    ),
    "d": Question(
        "The resolution policy, in sampling and in training",
        resolution_policy,
        (
            Claim(
                "Without training, positions, attention and the static shift of the policy are "
                "better than the base's own.",
                "paper, Table 1",
                {
                    "policy in training": "nothing trained",
                    "NTK factor": 10.0,
                    "proportional attention": "on",
                    "shift": "static",
                },
                {
                    "policy in training": "nothing trained",
                    "NTK factor": 1.0,
                    "proportional attention": "off",
                    "shift": "dynamic",
                },
            ),
            Claim(
                "The static shift is better than the dynamic one, with the policy on.",
                "paper, its policy at inference",
                {"NTK factor": 10.0, "shift": "static"},
                {"NTK factor": 10.0, "shift": "dynamic"},
            ),
            Claim(
                "A static shift of 10 is better than the scheduler's own, 3.",
                "the reference implementation's intent",
                {"shift": 10.0},
                {"shift": "static"},
            ),
            Claim(
                "Of an adapter trained with the policy on, sampling with NTK factor 10 is better "
                "than with 1.",
                "paper, its policy at inference",
                {"policy in training": "on", "NTK factor": 10.0},
                {"policy in training": "on", "NTK factor": 1.0},
            ),
            Claim(
                "Training with the policy that samples is better than the reference's training "
                "without it.",
                "this project's default",
                {"policy in training": "on", "NTK factor": 10.0, "shift": "static"},
                {"policy in training": "off", "NTK factor": 10.0, "shift": "static"},
            ),
            Claim(
                "Trained and sampled with positions that follow the size is better than with NTK "
                "factor 10.",
                "this project's `auto`, which its miniature's recipes have",
                {"policy in training": "auto", "NTK factor": "auto", "shift": "static"},
                {
                    "policy in training": "on",
                    "NTK factor": 10.0,
                    "proportional attention": "on",
                    "shift": "static",
                },
            ),
        ),
        x="NTK factor",
        lines=("proportional attention", "shift"),
        panels="policy in training",
    ),
    "e": Question(
        "Minor components in bf16: the exact form or the reference's residual",
        residual_form,
        (
            Claim(
                "Trained and sampled in bf16, the exact form is better than the residual rounded "
                "to bf16.",
                "this project's default",
                {"form": "exact"},
                {"form": "bf16 residual"},
            ),
        ),
        x="form",
        lines=("data",),
    ),
    "f": Question(
        "An adapter trained on dev, on schnell",
        transfer,
        (
            Claim(
                "On schnell, an adapter trained on dev is better than none.",
                "the reference, which publishes its adapter converted for schnell",
                {"base": "schnell", "adapter": "trained on dev"},
                {"base": "schnell", "adapter": "none"},
            ),
        ),
        x="adapter",
        lines=("base",),
    ),
}
