import json
import random
from dataclasses import replace

import pytest
import torch

from urae.features.images import decode_image
from urae.features.sources import find_sources
from urae.miniature.check import check_scene
from urae.miniature.grammar import parse_caption
from urae.miniature.photograph import Camera, blur, decode_picture, take_photograph
from urae.miniature.render import render
from urae.miniature.sources import (
    VAGUE_SHARE,
    WRONG_SHARE,
    sample_clean,
    sample_real,
    spoil,
    write_folder,
)
from urae.miniature.world import caption, sample_scene

STRAIGHT = Camera(1.0, 0.5, 0.5, 0.0, 1.0, 0.0, (1.0, 1.0, 1.0), 95)


def test_clean_samples_are_what_they_say():
    for index in range(10):
        sample = sample_clean(index, 5, 256, 320)
        assert sample.file is None
        assert check_scene(sample.picture, parse_caption(sample.caption)).passed
        assert check_scene(sample.picture, sample.scene).passed


@pytest.mark.parametrize("draw", [sample_clean, sample_real])
def test_a_sample_depends_on_index_and_seed_alone(draw):
    first, again = draw(3, 1, 128, 192), draw(3, 1, 128, 192)
    assert torch.equal(first.picture, again.picture)
    assert (first.caption, first.scene) == (again.caption, again.scene)
    assert draw(4, 1, 128, 192).scene != first.scene != draw(3, 2, 128, 192).scene


def test_a_real_sample_shows_the_scene_of_the_clean_one():
    assert sample_real(3, 1, 128, 192).scene == sample_clean(3, 1, 128, 192).scene
    assert sample_real(3, 1, 512, 512).caption == sample_real(3, 1, 128, 192).caption


def words_of(described):
    objects = [tuple(vars(each).values()) for each in described.objects]
    rest = (described.texture, described.background, described.light)
    return [*sum(objects, ()), *described.relations, *rest]


def test_descriptions_are_spoilt_as_often_as_stated():
    rng, count = random.Random(0), 2000
    true = wrong = 0
    for seed in range(count):
        full = sample_scene(seed).description
        told = spoil(full, rng)
        true += told == full
        pairs = zip(words_of(told), words_of(full), strict=True)
        wrong += sum(a not in (None, b) for a, b in pairs) == 1
    assert true / count == pytest.approx((1 - WRONG_SHARE) * (1 - VAGUE_SHARE), abs=0.03)
    # some vague captions leave out the wrong word
    assert WRONG_SHARE * (1 - VAGUE_SHARE / 2) - 0.03 < wrong / count < WRONG_SHARE


def test_real_captions_are_spoilt():
    samples = [sample_real(index, 0, 32, 32) for index in range(20)]
    true = [sample.caption == caption(sample.scene) for sample in samples]
    assert any(true)
    assert not all(true)


def test_real_pictures_differ_from_clean_ones_but_show_their_objects():
    correct = []
    for index in range(20):
        real, clean = (draw(index, 2, 256, 256) for draw in (sample_real, sample_clean))
        assert (real.picture.float() - clean.picture.float()).abs().mean() > 3
        report = check_scene(real.picture, real.scene)
        correct.append(report.colours and report.background)
    assert sum(correct) >= 18


def photograph(scene, **changes):
    return decode_picture(take_photograph(scene, replace(STRAIGHT, **changes), 256, 256)).float()


def test_a_straight_camera_shows_the_render():
    scene = sample_scene(1)
    difference = photograph(scene) - render([scene], 256, 256)[0].float()
    assert difference.abs().mean() < 3  # of the compression


def test_what_a_camera_changes():
    scene = sample_scene(1)
    straight = photograph(scene)
    assert photograph(scene, gains=(0.8, 0.8, 0.8)).mean() < 0.85 * straight.mean()
    assert photograph(scene, blur_pixels=2.0).std() < straight.std()
    assert (photograph(scene, quality=20) - straight).abs().mean() > 1
    assert (photograph(scene, degrees=3.0) - straight).abs().mean() > 1
    left, right = (photograph(scene, share=0.75, right=right) for right in (0.0, 1.0))
    offset = round(256 / 0.75) - 256
    difference = left[:, :, offset:] - right[:, :, :-offset]
    assert difference.abs().mean() < 3 < (left - right).abs().mean()


def test_a_blur_keeps_what_is_flat_and_does_nothing_at_zero():
    picture = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(blur(picture, 0.0), picture)
    torch.testing.assert_close(blur(torch.ones(1, 3, 24, 24), 1.5), torch.ones(1, 3, 24, 24))
    assert blur(picture, 1.0).std() < picture.std()


@pytest.mark.parametrize(("kind", "suffix"), [("clean", ".png"), ("real", ".jpg")])
def test_a_folder_is_what_caching_reads(tmp_path, kind, suffix):
    write_folder(tmp_path / "data", kind, [0, 2], 4, 64, 96)
    sources, skips = find_sources(tmp_path / "data")
    assert not skips
    assert [source.image.name for source in sources] == [f"000000{suffix}", f"000002{suffix}"]
    draw = sample_real if kind == "real" else sample_clean
    sample = draw(2, 4, 64, 96)
    assert sources[1].captions == {"prompt": sample.caption}
    image = decode_image(sources[1].image.read_bytes(), "1")
    assert image.tobytes() == sample.picture.permute(1, 2, 0).numpy().tobytes()


def test_several_processes_write_what_one_does(tmp_path):
    for workers in (1, 2):
        write_folder(tmp_path / str(workers), "real", range(10), 4, 64, 96, workers=workers)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / str(workers)).glob("0*")}
        for workers in (1, 2)
    )
    assert len(one) == 20
    assert two == one


def test_a_folder_is_gone_on_with(tmp_path):
    write_folder(tmp_path, "clean", range(2), 0, 32, 32)
    kept = tmp_path / "000001.json"
    kept.write_text(json.dumps({"prompt": "by hand"}))
    (tmp_path / "000000.png").unlink()
    write_folder(tmp_path, "clean", range(3), 0, 32, 32)
    assert len(list(tmp_path.glob("0*"))) == 6
    assert "by hand" in kept.read_text()


def test_a_folder_of_somebody_elses_is_kept(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"mine")
    (tmp_path / "000001.json").write_text("mine too")
    with pytest.raises(FileExistsError, match=r"holds files, but no .* choose a new or an empty"):
        write_folder(tmp_path, "clean", range(3), 0, 32, 32)
    assert (tmp_path / "000001.json").read_text() == "mine too"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_a_kill_left_empty_is_taken(tmp_path):
    (tmp_path / ".urae").mkdir()
    (tmp_path / ".urae" / ".scenes.json.tmp").write_text("{")
    assert write_folder(tmp_path, "clean", range(1), 0, 32, 32) == 1


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff"])
def test_a_damaged_record_is_named(tmp_path, text):
    write_folder(tmp_path, "clean", range(1), 0, 32, 32)
    (tmp_path / ".urae" / "scenes.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"scenes\.json is damaged, .*; choose another folder, or"):
        write_folder(tmp_path, "clean", range(1), 0, 32, 32)


def test_no_such_size(tmp_path):
    for call in (
        lambda: sample_real(0, 0, 100, 64),
        lambda: write_folder(tmp_path / "data", "real", [0], 0, 100, 64),
    ):
        with pytest.raises(ValueError, match="height 100 is not a positive multiple of 16"):
            call()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("other", [("real", 0, 32, 32), ("clean", 1, 32, 32), ("clean", 0, 32, 48)])
def test_a_folder_holds_one_set(tmp_path, other):
    assert write_folder(tmp_path, "clean", range(2), 0, 32, 32) == 2
    kind, seed, height, width = other
    with pytest.raises(ValueError, match=r"holds pictures of another set \(kind clean, seed 0"):
        write_folder(tmp_path, kind, range(3), seed, height, width)
    assert write_folder(tmp_path, "clean", range(3), 0, 32, 32) == 1
