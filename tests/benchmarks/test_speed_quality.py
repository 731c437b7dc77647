import json
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import speed_quality
from speed_quality import EXACT, compare, list_candidates, list_row

from urae.generate import progressive


class Inline:
    """Does in this process what a pool does in others."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def run(bases, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(speed_quality, "start_processes", Inline)

    def measure(*candidates, captions=2, adapter="dev_2k_lora", output=tmp_path, more=()):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                *("speed_quality.py", "--model", str(bases["dev"]), "--output", str(output)),
                *("--adapter", str(expected / f"{adapter}.safetensors"), "--side", "192"),
                *more,
                *("--captions", str(captions), "--seeds", "2", "--batch", "2", "--steps", "2"),
                *("--candidates", *candidates),
            ],
        )
        speed_quality.main()
        return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}

    return measure


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_candidates_against_exact_and_on_from_where_a_run_broke_off(run, tmp_path, monkeypatch):
    whole = "_must_be_whole"  # as such small ones are
    monkeypatch.setattr(progressive.Progressive, whole, lambda *_: False)
    both = "progressive=0.5+taylorseer-cache=1"
    found = run("progressive=0.5", "taylorseer-cache=1", both)
    assert set(found) == {EXACT, "progressive=0.5", "taylorseer-cache=1", both}
    assert found[both]["psnr"] == found["progressive=0.5"]["psnr"]
    assert all(len(each["passed"]) == len(each["psnr"]) == 4 for each in found.values())
    assert found[EXACT]["psnr"] == found["taylorseer-cache=1"]["psnr"] == [99.0] * 4
    assert max(found["progressive=0.5"]["psnr"]) < 50
    assert "| progressive=0.5 | 4 |" in (tmp_path / "results.md").read_text()

    path = tmp_path / "progressive=0.5.json"
    half = dict(found["progressive=0.5"], passed=[False] * 2, psnr=[1.0] * 2, seconds=[0.1] * 2)
    path.write_text(json.dumps(half))
    again = run("progressive=0.5", "taylorseer-cache=1")["progressive=0.5"]
    assert again["psnr"] == [1.0, 1.0, *found["progressive=0.5"]["psnr"][2:]]
    monkeypatch.setattr(speed_quality, "draw", None)  # nothing is left to do
    run("progressive=0.5", "taylorseer-cache=1")
    with pytest.raises(ValueError, match="is of another study"):
        run("progressive=0.5", captions=1)


@pytest.mark.slow
def test_adapters_against_one_another(run, tmp_path):
    run(EXACT)
    against = ("--against", str(tmp_path))
    other = {"adapter": "dev_4k_minor", "output": tmp_path / "other", "more": against}
    found = run("taylorseer-cache=1", **other)
    assert set(found) == {EXACT, "taylorseer-cache=1"}
    assert max(found[EXACT]["psnr"]) < 99  # to the first adapter's pictures
    assert not (other["output"] / EXACT).exists()
    text = (other["output"] / "results.md").read_text()
    assert text.index("| against | 4 |") < text.index("| exact | 4 |")
    assert "dev_4k_minor" in text
    assert "dev_2k_lora" in text
    with pytest.raises(ValueError, match="only adapters may differ"):
        run(EXACT, captions=1, **other)
    missing = {**other, "more": ("--against", str(tmp_path / "typo"))}
    with pytest.raises(FileNotFoundError, match=r"typo/exact\.json is missing"):
        run(EXACT, **missing)
    with pytest.raises(ValueError, match="is of another study"):
        run("taylorseer-cache=1", adapter="dev_4k_minor", more=("--beside",))


def record(passed, captions):
    return {
        "passed": passed,
        "psnr": [30.0] * len(passed),
        "seconds": [2.0] * len(passed),
        "spectrum": [4.0 * len(passed), 1.0 * len(passed)],
        "study": {"num_captions": captions},
    }


def test_the_interval_is_that_of_captions_and_decides():
    exact = record([True] * 500, 500)
    same = compare(exact, exact)
    assert (same["difference"], same["spectrum"], same["speedup"]) == (0, 0, 1)
    assert 0.003 < same["high"] == -same["low"] < 0.006
    assert list_row("a", same)[-1] == "fast, turbo"
    slightly = compare(exact, record([False] * 15 + [True] * 485, 500))
    assert slightly["difference"] == pytest.approx(-0.03)
    assert -0.05 < slightly["low"] < -0.04 < -0.02 < slightly["high"] < -0.01
    assert list_row("a", slightly)[-1] == "turbo"
    broken_off = compare(exact, record([True] * 100, 500))
    assert (broken_off["count"], broken_off["spectrum"]) == (100, None)
    few = compare(record([True] * 8, 4), record([True] * 8, 4))
    assert list_row("a", few)[-1] == "none"
    # noises of one caption that fail together count once
    together = compare(record([True] * 200, 100), record(([False] * 10 + [True] * 90) * 2, 100))
    apart = compare(record([True] * 200, 200), record([False] * 20 + [True] * 180, 200))
    assert together["difference"] == apart["difference"]
    assert together["high"] - together["low"] > 1.3 * (apart["high"] - apart["low"])


def test_candidates_by_machine():
    assert "fp8" in list_candidates([], on_gpu=True)
    assert "fp8" not in list_candidates([], on_gpu=False)
    assert list(list_candidates([EXACT], on_gpu=False)) == [EXACT]
    assert list(list_candidates(["mag-cache=1"], on_gpu=False, beside=True)) == ["mag-cache=1"]
    assert list(list_candidates(["mag-cache"], on_gpu=False)) == [EXACT, "mag-cache=0.06"]
    joined = list_candidates(["taylorseer-cache=3+fp8"], on_gpu=True)
    assert list(joined) == [EXACT, "fp8+taylorseer-cache=3"]
    with pytest.raises(ValueError, match="part 'magic' is unknown"):
        list(list_candidates(["magic"], on_gpu=False))


def test_exact_pictures_are_waited_for(tmp_path, monkeypatch):
    path, slept = tmp_path / "00000.png", []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            path.touch()

    monkeypatch.setattr(speed_quality.time, "sleep", sleep)
    speed_quality.wait_for(path)
    assert len(slept) == 3
    monkeypatch.setattr(speed_quality, "_MAX_WAIT_SECONDS", 2)
    with pytest.raises(FileNotFoundError, match="run --candidates exact first, or beside this"):
        speed_quality.wait_for(tmp_path / "00001.png")
