"""Curves as pictures."""

import pytest
from PIL import Image

from urae.train.chart import Curve, draw_curves, smooth


@pytest.mark.parametrize(
    "values", [[0.5], [0.3] * 7, [1e-3, 2e-3], [1.0 / n for n in range(1, 99)]]
)
def test_any_run_can_be_drawn(tmp_path, values):
    draw_curves([smooth("loss", values), Curve("held out", [(0, 0.4)])], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1120, 400)
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 10


def test_other_values_make_another_picture(tmp_path):
    for name, values in {"a": [1.0, 2.0, 3.0], "b": [1.0, 3.0, 2.0]}.items():
        draw_curves([smooth("loss", values)], tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
