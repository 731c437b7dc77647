import re
from dataclasses import replace

import pytest

from urae.backbones.flux import PACKAGED, build_meta_transformer
from urae.backbones.weights import find_attention_linears, linear_shape
from urae.study import StudyConfig
from urae.study.cells import Weights
from urae.study.metrics import METRICS, PARTS
from urae.study.questions import QUESTIONS, SHARES, TEACHER_STEPS
from urae.study.report import decide
from urae.study.results import Row
from urae.study.run import group_cells, list_cells

NUM_CELLS = {"a": 8, "b": 39, "c": 15, "d": 20, "e": 4, "f": 5}
NUM_RUNS = {"a": 8, "b": 13, "c": 15, "d": 3, "e": 4, "f": 2}


@pytest.mark.parametrize("letter", QUESTIONS)
def test_cells_are_distinct_and_come_in_three_seeds(letter, all_cells):
    cells = all_cells(letter)
    assert len(cells) == 3 * NUM_CELLS[letter]
    assert len({cell.key for cell in cells}) == len(cells)
    places = {(cell.seed, *cell.factors.items()) for cell in cells}
    assert len(places) == len(cells)
    runs = [group for group in group_cells(cells) if group[0].training]
    assert len(runs) == 3 * NUM_RUNS[letter]
    names = {tuple(cell.factors) for cell in cells}
    question = QUESTIONS[letter]
    panels = () if question.panels is None else (question.panels,)
    assert len(names) == 1 and {question.x, *question.lines, *panels} <= set(*names)


def test_the_page_counts_as_the_lists_do(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "study.md").read_text()
    rows = re.findall(r"^\| ([a-f]) \| .+ \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert rows == [(k, str(NUM_CELLS[k]), str(NUM_RUNS[k])) for k in QUESTIONS]
    assert sum(len(question.claims) for question in QUESTIONS.values()) == 19
    assert "which are nineteen" in text


@pytest.mark.parametrize("letter", QUESTIONS)
def test_every_claim_has_cells_that_decide_it(letter, all_cells):
    figures = dict.fromkeys((*METRICS, *PARTS), 0.0)
    rows = [Row(cell, {"figures": figures}) for cell in all_cells(letter)]
    for claim in QUESTIONS[letter].claims:
        assert decide(claim, rows)["score"].count == 3, claim.text


def test_the_eight_cells_of_table_2(all_cells):
    cells = [cell for cell in all_cells("a") if cell.seed == 0]
    for cell in cells:
        training = cell.training
        assert cell.factors == {
            "adapter": training.adapter,
            "data": training.parts[0].data.source,
            "guidance": training.guidance_scale,
        }
        assert (training.side, training.rank, training.over) == (512, 16, None)
        assert cell.scoring.guidance_scale == 3.5
    assert {cell.factors["guidance"] for cell in cells} == {1.0, 3.5}


def test_shares_add_up_and_never_show_a_scene_twice(all_cells):
    cells = [cell for cell in all_cells("b") if cell.seed == 0]
    for cell in cells:
        sizes = {part.data.source: part.stop - part.start for part in cell.training.parts}
        assert sum(sizes.values()) == 1000
        assert sizes.get("synthetic", 0) == 1000 * cell.factors["share"]
        stops = [0, *(part.stop for part in cell.training.parts)]
        assert [part.start for part in cell.training.parts] == stops[:-1]
        assert cell.scoring.at_step in (125, 250, 500)
    assert {cell.factors["share"] for cell in cells} == set(SHARES)
    assert {cell.factors["teacher steps"] for cell in cells} == {"none", *TEACHER_STEPS}


def test_components_train_equally_many_parameters(all_cells):
    meta = build_meta_transformer(PACKAGED["miniature-dev"])
    shapes = [linear_shape(meta, name) for name in find_attention_linears(meta)]
    counts = {}
    for cell in all_cells("c"):
        training = cell.training
        trained = sum(
            training.rank * (inside if training.adapter == "mica" else inside + outside)
            for outside, inside in shapes
        )
        counts.setdefault(cell.factors["rank"], set()).add(trained)
        assert training.over is not None and training.side == 1024
    assert sorted(counts) == [4, 16, 64]
    assert all(len(each) == 1 for each in counts.values())


def test_sampling_policies_share_one_run(all_cells):
    groups = group_cells([cell for cell in all_cells("d") if cell.seed == 0])
    assert sorted(map(len, groups)) == [1, 4, 5, 10]
    factors = {cell.scoring.policy.ntk_factor for group in groups for cell in group}
    assert factors == {1.0, 4.0, 10.0, 40.0, "auto"}
    shifts = {cell.scoring.policy.time_shift for group in groups for cell in group}
    assert shifts == {None, 10.0, "dynamic"}


def test_an_adapter_of_dev_goes_onto_schnell(all_cells):
    cells = {tuple(cell.factors.values()): cell for cell in all_cells("f") if cell.seed == 0}
    direct, transferred = cells["schnell", "none"], cells["schnell", "trained on dev"]
    assert direct.training is direct.scoring.policy is None
    assert transferred.training == cells["dev", "trained on dev"].training
    assert transferred.scoring.model == direct.scoring.model
    assert (transferred.scoring.steps, transferred.scoring.guidance_scale) == (4, 0.0)


def test_a_cell_is_known_by_its_content(tmp_path, write_stages):
    teacher = write_stages(tmp_path)
    cell = list_cells(StudyConfig("a", teacher))[0]
    assert cell.key == list_cells(StudyConfig("a", teacher))[0].key
    assert cell.with_seed(7).key != cell.key
    longer = replace(cell, training=replace(cell.training, steps=501))
    assert longer.key != cell.key
    elsewhere = Weights("/elsewhere", cell.training.model.revision)
    moved = replace(cell, training=replace(cell.training, model=elsewhere))
    assert moved.key == cell.key
    assert replace(cell, factors={"name": "another"}).key == cell.key
    (teacher / "teacher_512.safetensors").write_bytes(b"trained again")
    assert list_cells(StudyConfig("a", teacher))[0].key != cell.key


def test_a_missing_teacher_is_said_first(study):
    with pytest.raises(FileNotFoundError, match=r"vae\.safetensors does not exist; the teacher's"):
        list_cells(study("a", stand_in=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_seeds": 0}, "num_seeds 0 must be at least 1"),
        ({"num_samples": 16}, "num_validation 16 must be at least 1 and below 16"),
        ({"lr": 0.0}, r"lr 0\.0 must be a positive number"),
        ({"lr": -1.0}, r"lr -1\.0 must be a positive number"),
        ({"max_minutes": 0.0}, r"max_minutes 0\.0 must be a positive number"),
        ({"side_2k": 500}, "side_2k 500 is not a positive multiple of 16"),
        ({"side_2k": 176}, "side_2k 176 must be at least 192, the smallest that the scene check"),
    ],
)
def test_sizes_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig("a", **changes)
