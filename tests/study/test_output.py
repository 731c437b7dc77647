"""What a study refuses before anything is made, and what it leaves as it is."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from urae.cli.main import app
from urae.study import run, run_study
from urae.study.output import find_page, put_into_page
from urae.study.questions import QUESTIONS, table_2
from urae.study.run import list_cells


@pytest.fixture(autouse=True)
def nothing_is_made(monkeypatch):
    """Question a, but for two of its cells; nothing may be made for it."""
    short = replace(QUESTIONS["a"], cells=lambda bench: table_2(bench)[:2])
    monkeypatch.setitem(QUESTIONS, "a", short)
    monkeypatch.setattr(run, "_run_all", lambda *_: [])


@pytest.fixture
def unmade(monkeypatch):
    """Fail where anything would be made."""
    monkeypatch.setattr(run, "_run_all", lambda *_: pytest.fail("began"))


def read_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def published(study, finish):
    """Publish question a with two seeds; return its configuration and the folder's files."""
    config = study("a", num_seeds=2)
    finish(config, list_cells(config))
    assert run_study(config).done == 4
    return config, read_folder(config.output_dir)


def test_where_nothing_is_done_what_is_there_stays(study, published, tmp_path):
    config, files = published
    result = run_study(replace(config, work_dir=tmp_path / "empty"))
    assert (result.done, result.text_path) == (0, None)
    assert read_folder(config.output_dir) == files


@pytest.mark.parametrize("changes", [{"steps": 2}, {"num_seeds": 1}, {"num_captions": 2}])
def test_results_of_another_study_are_not_replaced(published, unmade, changes):
    config, files = published
    message = r"a\.csv holds \d results that this study does not have.*; choose another --output"
    with pytest.raises(ValueError, match=message):
        run_study(replace(config, **changes))
    assert read_folder(config.output_dir) == files


def test_results_of_another_device_are_not_replaced(published, finish, tmp_path):
    config, files = published
    elsewhere = replace(config, work_dir=tmp_path / "elsewhere")
    finish(elsewhere, list_cells(config), device="NVIDIA H200", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"a\.csv holds 4 results that this study does not have"):
        run_study(elsewhere)
    assert read_folder(config.output_dir) == files


def test_a_table_is_replaced_by_as_many_rows_or_more(published, finish, tmp_path):
    config, files = published
    more = replace(config, num_seeds=3, work_dir=tmp_path / "elsewhere")
    cells = list_cells(more)
    finish(more, cells[1:])
    result = run_study(more)
    assert (result.done, result.text_path) == (5, None)
    assert read_folder(config.output_dir) == files
    finish(more, cells[:4])
    assert run_study(more).text_path == config.output_dir / "a.md"
    assert read_folder(config.output_dir)["a.csv"].count(b"\n") == 1 + 6


def test_a_foreign_table_is_not_replaced(study, unmade):
    config = study("a")
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "a.csv").write_text("week,hours\n1,40\n")
    with pytest.raises(ValueError, match=r"a\.csv holds 1 results that this study does not have"):
        run_study(config)


def test_the_last_line_says_that_nothing_was_written(monkeypatch, tmp_path):
    monkeypatch.setattr("urae.study.run_study", lambda *_, **__: run.StudyResult(0, 4, None))
    command = ["study", "a", "--work", str(tmp_path / "empty"), "--output", "out"]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0
    said = " ".join(outcome.output.split())
    assert (
        "0 of 4 runs, nothing written to out: no run is done yet; the same command continues"
        in said
    )


@pytest.mark.parametrize("device", ["NVIDIA H200", "mps"])
def test_results_of_another_device_are_not_gone_on_with(study, finish, unmade, device):
    config = study("a")
    first, second = list_cells(config)
    (path,) = finish(config, [first], device=device, dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"{path.name} was measured on .* other cells .* on cpu"):
        run_study(config)
    finish(config, [second])
    with pytest.raises(ValueError, match=r"was measured on .*; choose another --work, or delete"):
        run_study(config)


def test_a_report_needs_no_gpu(study, finish):
    config = study("a")
    cells = list_cells(config)
    finish(config, cells[:1], device="NVIDIA H200", dtype="bfloat16")
    finish(config, cells[1:], device="NVIDIA A100-SXM4-80GB", dtype="bfloat16")
    assert run_study(config).done == 2
    assert "on NVIDIA A100-SXM4-80GB, NVIDIA H200" in (config.output_dir / "a.md").read_text()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"figures": {"score": 1.0}}'])
def test_a_damaged_result_is_named(study, finish, unmade, text):
    config = study("a")
    path, _ = finish(config, list_cells(config))
    path.write_text(text)
    with pytest.raises(
        ValueError, match=rf"{path.name} is not a complete result of a cell; delete it"
    ):
        run_study(config)


def test_a_page_without_a_place_is_refused_first(study, unmade):
    config = study("a")
    page = config.output_dir.with_suffix(".md")
    page.parent.mkdir()
    page.write_text("# Study\n")
    with pytest.raises(ValueError, match="has no place for question a; put <!-- results of a -->"):
        run_study(config)
    with pytest.raises(ValueError, match="has no place for question b; put <!-- results of b -->"):
        put_into_page(page, "b", "text")


def test_an_output_that_is_a_file_is_refused_first(study, unmade, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "study"):
        with pytest.raises(FileExistsError, match=r"file is a file; choose another with --output"):
            run_study(study("a", output_dir=output))


def test_pages_lie_beside_folders_whatever_their_names(tmp_path, monkeypatch):
    folder = tmp_path / "v1.2"
    folder.mkdir()
    page = tmp_path / "v1.md"
    page.write_text("of another folder")
    assert find_page(folder) is None
    page = tmp_path / "v1.2.md"
    page.write_text("of this one")
    monkeypatch.chdir(folder)
    assert find_page(folder) == page
    assert find_page(type(folder)(".")) == page
