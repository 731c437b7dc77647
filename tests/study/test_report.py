import csv
import io
import math
from dataclasses import replace

import pytest
from matplotlib.axes import Axes
from PIL import Image

from urae.study.plot import draw
from urae.study.questions import QUESTIONS
from urae.study.report import decide, judge, summarize, write_report, write_text
from urae.study.statistics import Estimate

FIRST, *_ = QUESTIONS["a"].claims


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.2, "agrees"), (-0.2, "disagrees"), (0.001, "cannot tell")]
)
def test_verdicts_follow_from_the_paired_interval(rows, gain, verdict):
    found = decide(FIRST, rows(gain))["score"]
    assert found.count == 3 and found.mean == pytest.approx(gain + 0.01)
    # the seeds' differences are gain, gain + 0.01 and gain + 0.02
    assert found.high - found.mean == pytest.approx(4.3027 * 0.01 / 3**0.5, abs=1e-6)
    assert judge(found) == verdict
    text = write_text("a", QUESTIONS["a"], rows(gain), 24)
    assert f"with 3.5. (paper, section 3.3 and Table 2): **{verdict}**. Paired" in text


def test_what_no_seed_changes_has_no_interval(rows):
    untrained = [replace(row, cell=replace(row.cell, training=None)) for row in rows()]
    text = write_text("a", QUESTIONS["a"], untrained, 24)
    assert "| lora | clean | 1 | 52.0 (47.0 to 57.0) |" in text
    assert "| 0.3000 | 1.00 | 0.1000 |" in text
    assert "+21.0 (+18.5 to +23.5); held-out loss -0.2000.\n" in text
    (figures, *_) = [figures for _, figures in summarize(untrained[:1])]
    assert figures["held_out_loss"].low == -math.inf  # one seed does not tell that


def test_a_claim_leaves_out_what_no_pair_differs_in(rows):
    text = write_text("a", QUESTIONS["a"], rows(), 24)
    assert "+21.0 (+18.5 to +23.5); held-out loss -0.2000 (-0.2000 to -0.2000).\n" in text
    assert "spectrum" not in text.split("|")[0]
    failed = [replace(row, record={**row.record, "figures": {**row.figures, "score": 0.0}})
              for row in rows()]  # fmt: skip
    assert judge(decide(FIRST, failed)["score"]) == "cannot tell"
    text = write_text("a", QUESTIONS["a"], failed, 24)
    assert "**cannot tell**. Paired difference over 3 seeds: scene check, % +0.0; held-out" in text
    assert "| lora | clean | 1 | 0.0 (0.0 to 56.1) |" in text


def test_one_seed_tells_nothing(rows):
    assert judge(decide(FIRST, rows(seeds=1))["score"]) == "cannot tell"
    assert "over 1 seed: scene check, % +20.0 (no interval)" in write_text(
        "a", QUESTIONS["a"], rows(seeds=1), 8
    )
    assert judge(Estimate(0.0, 0.0, 0.0, 3)) == "cannot tell"


def test_unpaired_cells_decide_nothing(rows):
    some = [row for row in rows() if row.cell.factors["guidance"] == 1.0]
    assert decide(FIRST, some) is None
    text = write_text("a", QUESTIONS["a"], some, 24)
    assert "**not tested**" in text and "Unfinished: 12 of 24 runs." in text
    # a seed whose pairs are not all there is left out
    partial = [row for row in rows() if row.cell.seed < 2 or row.cell.factors["adapter"] == "lora"]
    assert decide(FIRST, partial)["score"].count == 2


def test_table_plot_and_text_are_written_and_go_into_the_page(rows, study):
    config = study("a")
    page = config.output_dir.with_suffix(".md")
    page.parent.mkdir()
    page.write_text("# A\n<!-- results of a -->\nNot run yet.\n<!-- end of a -->\n# B\n")
    path = write_report(config, rows(), 24)
    table = list(csv.DictReader(io.StringIO((config.output_dir / "a.csv").read_text())))
    assert len(table) == 24
    assert (table[0]["adapter"], table[0]["guidance"], table[0]["seed"]) == ("lora", "1.0", "0")
    assert table[0]["training.parts"] == "0 to 4 of 4 clean"
    assert float(table[0]["score"]) == pytest.approx(0.5)
    assert (config.output_dir / "a.png").read_bytes().startswith(b"\x89PNG")
    text = path.read_text()
    assert "| lora | clean | 1 | 52.0 (47.0 to 57.0) | 95.0 (" in text
    assert page.read_text().startswith("# A\n<!-- results of a -->\n\n8 cells, 3 seeds, on H200")
    assert "(study/a.png)" in page.read_text() and page.read_text().endswith("# B\n")


def test_the_page_of_the_project_has_a_place_for_each_question(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "study.md").read_text()
    for letter in QUESTIONS:
        assert f"<!-- results of {letter} -->" in text and f"<!-- end of {letter} -->" in text


def test_a_plot_of_cells_with_one_seed_and_several_panels(all_cells, tmp_path):
    one = Estimate(0.5, 0.4, 0.6, 3)
    alone = replace(one, low=-math.inf, high=math.inf, count=1)
    cells = [cell for cell in all_cells("d") if cell.seed == 0]
    estimates = {"score": one, "parts": one, "held_out_loss": alone}
    draw(QUESTIONS["d"], [(cell.factors, estimates) for cell in cells], tmp_path / "d.png")
    with Image.open(tmp_path / "d.png") as picture:
        assert min(picture.size) > 500


def test_points_lie_side_by_side_where_a_tick_has_several(all_cells, tmp_path, monkeypatch):
    places, errorbar = {}, Axes.errorbar

    def record(axes, x, y, **how):
        panel = axes.get_subplotspec().colspan.start
        places.setdefault(panel, {})[how["label"]] = x
        return errorbar(axes, x, y, **how)

    monkeypatch.setattr(Axes, "errorbar", record)
    share = Estimate(0.0, 1e-18, 0.0126, 3)  # Wilson's, of no picture that passes
    cells = [cell for cell in all_cells("d") if cell.seed == 0]
    figures = dict.fromkeys(("score", "parts", "held_out_loss"), share)
    summary = [(cell.factors, figures) for cell in cells]
    draw(QUESTIONS["d"], summary, tmp_path / "d.png")
    on, _, auto, none = (places[panel] for panel in range(4))
    assert on["on, static"][1] == 1 and on["on, static"][3:] == [3, 4]  # alone: upon the tick
    assert auto == {"on, static": [4]}
    assert none["on, static"] == pytest.approx([1.95, 4])
    assert none["on, dynamic"] == pytest.approx([2.05])
    here = [on[line][-1] for line in ("off, static", "on, 10", "on, dynamic")]
    assert [on["on, static"][2], *here] == pytest.approx([1.85, 1.95, 2.05, 2.15])


def test_a_study_without_matplotlib(monkeypatch):
    from urae.study import plot

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[study\]'"):
        plot.check_plotting()
