import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import forward
import plots
from forward import EXACT, LOCAL, STOCK, measure_scaling, measure_scaling_vae
from plots import draw_scaling
from report import write_report

IN_SVG = f"<!-- {EXACT} -->"  # matplotlib's, over the paths of the letters
PARTS = [*forward.SCALING, "scaling_vae"]


@pytest.fixture
def bench(bases, expected, monkeypatch):
    """The smallest model there is, and three sizes in the place of six for the VAE."""
    monkeypatch.setattr(forward, "SIDES", (1024, 2048, 3072))
    monkeypatch.setattr(forward, "WHOLE_VAE_SIDES", (1024,))
    return SimpleNamespace(
        base=bases["dev"],
        lora=expected / "dev_2k_lora.safetensors",
        tiny=True,
        device=torch.device("cpu"),
        dtype=torch.float32,
        side=lambda pixels: pixels // 8,
    )


def record(part, result, *, shape="flux-dev"):
    versions = dict.fromkeys(("torch", "diffusers"), "1.0")
    return {
        "part": part,
        "shape": shape,
        "machine": {"machine": "a GPU", **versions},
        "commit": "0123456789",
        "command": "python",
        "part_seconds": 1,
        "result": result,
    }


def entry(seconds, gib):
    return {"seconds": seconds, "all_seconds": [seconds], "peak_gib": gib}


def write_records(folder, *, shape="flux-dev"):
    """Made-up figures, to look at the drawing alone."""
    full = {str(side): entry(side / 1000, side / 100) for side in (1024, 2048)}
    large = {"8192": {**entry(90.0, 60.0), "attention": "flash"}}
    results = {
        "scaling_stock": {STOCK: full},
        "scaling_exact": {EXACT: full},
        "scaling_local": {LOCAL: full},
        "scaling_exact_8k": {EXACT: large},
        "scaling_vae": {STOCK: full},
    }
    records = {name: record(name, each, shape=shape) for name, each in results.items()}
    for name, each in records.items():
        (folder / f"{name}.json").write_text(json.dumps(each))
    return records


@pytest.mark.parametrize("case", [STOCK, EXACT, LOCAL])
def test_forwards_are_measured_by_size(bench, case, capsys):
    found = measure_scaling(bench, case=case, sides=(1024, 2048))
    assert {case: list(by_side) for case, by_side in found.items()} == {case: ["1024", "2048"]}
    assert found[case]["2048"]["seconds"] > 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2048 x 2048: ")


def test_decodes_are_measured_by_size(bench):
    found = measure_scaling_vae(bench)
    assert [list(each) for each in found.values()] == [["1024"], ["1024", "2048", "3072"]]


@pytest.mark.parametrize(("case", "attention"), [(EXACT, "full"), (LOCAL, "local")])
def test_local_attention_is_measured_as_such(bench, monkeypatch, case, attention):
    policies = []

    def look(transformer, _bench, side, _count):
        policies.append((transformer.pos_embed.policy.attention, side))
        return [1.0]

    monkeypatch.setattr(forward, "time_forwards", look)
    measure_scaling(bench, case=case, sides=(1024, 2048))
    assert policies == [(attention, 1024), (attention, 2048)]


def test_the_report_lists_and_draws_them(tmp_path):
    write_records(tmp_path)
    write_report(tmp_path, PARTS)
    text = (tmp_path / "results.md").read_text()
    assert f"| 8192^2 | {EXACT} | 90.0 | 1 | 60.0 | flash |" in text
    for name in ("scaling_seconds", "scaling_gib"):
        assert f"![{name}]({name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert IN_SVG in (tmp_path / f"{name}.svg").read_text()


def test_a_plot_is_drawn_of_figures_alone(tmp_path):
    unmeasured = record("scaling_stock", {STOCK: {"1024": entry(0.2, None)}})
    assert [path.stem for path in draw_scaling({"scaling_stock": unmeasured}, tmp_path)] == [
        "scaling_seconds"
    ]
    assert draw_scaling({}, tmp_path) == []


def test_plots_for_the_docs_are_of_the_full_shape(tmp_path, monkeypatch, capsys):
    def run(folder, output):
        monkeypatch.setattr(sys, "argv", ["plots.py", str(folder), "--output", str(output)])
        plots.main()

    (tmp_path / "tiny").mkdir()
    write_records(tmp_path / "tiny", shape="tiny")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "tiny", tmp_path / "docs")
    assert "figures of the tiny shape, which mean nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "docs", tmp_path / "docs")
    assert "has none of scaling_exact.json" in capsys.readouterr().err

    write_records(tmp_path)
    run(tmp_path, tmp_path / "docs")
    run(tmp_path, tmp_path / "again")
    for name in ("scaling_seconds.svg", "scaling_seconds.png", "scaling_gib.svg"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("docs", "again"))
        assert first == second
