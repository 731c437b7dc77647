import random
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from urae.miniature.check import SceneReport, check_scene, compare, score
from urae.miniature.grammar import LIGHTS, SHAPES, TEXTURES, parse_caption
from urae.miniature.photograph import blur, decode_picture, encode_picture
from urae.miniature.read import LEAST_SIDE, read_picture
from urae.miniature.render import OBJECT_RGB, render
from urae.miniature.segment import find_components
from urae.miniature.sources import PARTS, make_wrong
from urae.miniature.world import Scene, SceneObject, sample_scene

SCENES = [sample_scene(seed) for seed in range(10_000, 10_040)]
MANY = [sample_scene(seed) for seed in range(20_000, 20_400)]
SCENE = Scene(
    (
        SceneObject("large", "red", "circle", 0.3, 0.4, 0.4),
        SceneObject("small", "blue", "square", 0.8, 0.6, 0.17),
    ),
    texture="striped",
    background="green",
    light="left",
    seed=3,
)
TEXTURED = [name for name in TEXTURES if name != "plain"]


def draw(scene, height=256, width=256):
    return render([scene], height, width)[0]


def resize(picture, height, width):
    large = F.interpolate(picture[None].float(), (height, width), mode="bicubic", antialias=True)
    return large[0].round().clamp(0, 255).byte()


def degrade(picture, seed=0, sigma=0.7, noise=4.0, quality=85):
    """What a decoder may do to a picture."""
    noise = noise * torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    changed = (blur(picture[None].float(), sigma)[0] + noise).round().clamp(0, 255).byte()
    return decode_picture(encode_picture(changed, "JPEG", quality=quality))


def failed(picture, scene):
    return failures(check_scene(picture, scene))


def failures(report):
    return {part for part, holds in vars(report).items() if not holds}


@pytest.fixture(scope="module")
def readings():
    return [read_picture(draw(scene)) for scene in SCENES]


# --- what must pass -------------------------------------------------------------------------------


def test_true_renders_pass(readings):
    assert all(compare(*pair).passed for pair in zip(readings, SCENES, strict=True))


@pytest.mark.parametrize("size", [(512, 512), (384, 256), (256, 512)])
def test_true_renders_of_other_sizes_pass(size):
    assert all(check_scene(draw(scene, *size), scene).passed for scene in SCENES[:10])


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (256, 384)])
def test_degraded_renders_pass(size):
    scenes = SCENES[: 40 if size == (256, 256) else 10]
    assert all(check_scene(degrade(draw(each, *size)), each).passed for each in scenes)


def test_the_largest_size():
    for scene in SCENES[:2]:
        assert check_scene(draw(scene, 1024, 1024), scene).passed
        assert check_scene(degrade(draw(scene, 1024, 1024)), scene).passed


def test_true_renders_of_the_least_size_pass():
    size = (LEAST_SIDE, LEAST_SIDE)
    reports = [check_scene(draw(scene, *size), scene) for scene in MANY[:200]]
    assert score(reports).share >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",
    [
        (LEAST_SIDE, LEAST_SIDE),
        (LEAST_SIDE, 2 * LEAST_SIDE),
        (256, 256),
        (512, 512),
        (1024, 1024),
        (512, 768),
        (384, 256),
    ],
)
def test_the_bars(size):
    readings = [read_picture(draw(scene, *size)) for scene in MANY]
    assert score(list(map(compare, readings, MANY))).share >= 0.99
    assert score(list(map(compare, readings, MANY[1:]))).share <= 0.05
    degraded = [read_picture(degrade(draw(scene, *size), scene.seed)) for scene in MANY]
    assert score(list(map(compare, degraded, MANY))).share >= 0.98


def test_numpy_and_a_caption_will_do():
    described = parse_caption(
        "a large red circle left of a small blue square on a striped green background"
    )
    assert check_scene(draw(SCENE).numpy(), described).passed
    assert check_scene(draw(SCENE), parse_caption("a square and a red circle")).passed
    assert failed(draw(SCENE), parse_caption("a square above a red circle")) == {"relations"}


# --- what must fail -------------------------------------------------------------------------------


def test_other_captions_fail(readings):
    assert not any(compare(*pair).passed for pair in zip(readings, SCENES[1:], strict=False))


@pytest.mark.parametrize("part", PARTS)
def test_one_wrong_word_fails_its_part(part, readings):
    rng = random.Random(0)
    name = part if part in ("background", "texture", "light") else f"{part}s"
    for reading, scene in zip(readings, SCENES, strict=True):
        if part != "relation" or len(scene.objects) > 1:
            wrong = make_wrong(scene.description, part, rng)
            assert failures(compare(reading, wrong)) == {name}


def test_a_tiled_picture_fails():
    for scene in SCENES[:10]:
        assert "objects" in failed(draw(scene, 128, 128).repeat(1, 2, 2), scene)
        assert "objects" in failed(draw(scene).repeat(1, 2, 2), scene)


def test_a_repeated_object_fails():
    twice = replace(SCENE, objects=(*SCENE.objects, replace(SCENE.objects[1], y=0.15)))
    assert failed(draw(twice), SCENE) == {"objects"}


def test_a_missing_object_fails():
    once = replace(SCENE, objects=SCENE.objects[:1])
    assert {"objects", "shapes", "colours", "sizes"} <= failed(draw(once), SCENE)


def test_an_extra_stain_fails():
    for rgb in (OBJECT_RGB["pink"], (20, 20, 20)):
        picture = draw(SCENE)
        picture[:, 200:212, 60:72] = torch.tensor(rgb)[:, None, None]
        assert "objects" in failed(picture, SCENE)


def test_an_object_of_two_colours_fails():
    picture, other = draw(SCENE), replace(SCENE.objects[0], colour="teal")
    picture[:, 102:] = draw(replace(SCENE, objects=(other, SCENE.objects[1])))[:, 102:]
    assert failed(picture, SCENE) == {"colours"}


def test_a_broken_object_fails():
    picture = draw(SCENE)
    picture[:, 92:112] = draw(replace(SCENE, objects=SCENE.objects[1:]))[:, 92:112]
    assert {"objects", "shapes"} <= failed(picture, SCENE)


def test_objects_that_touch_fail():
    near = replace(SCENE.objects[1], x=0.56, y=0.4)
    assert "objects" in failed(draw(replace(SCENE, objects=(SCENE.objects[0], near))), SCENE)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_field_of_one_colour_fails(value):
    picture = torch.full((3, 256, 256), value, dtype=torch.uint8)
    assert not check_scene(picture, SCENE).passed
    assert not check_scene(picture, parse_caption("a circle")).passed


def test_a_field_of_an_objects_colour_fails():
    picture = torch.tensor(OBJECT_RGB["red"], dtype=torch.uint8)[:, None, None].expand(3, 256, 256)
    assert not check_scene(picture, parse_caption("a red square")).passed


def test_noise_fails():
    picture = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)
    assert {"objects", "shapes", "background", "texture"} <= failed(picture, SCENE)


@pytest.mark.parametrize("texture", TEXTURED)
@pytest.mark.parametrize("factor", [2, 4])
def test_an_enlarged_picture_fails_its_texture(texture, factor):
    for scene in SCENES[: 6 // factor]:
        scene = replace(scene, texture=texture)
        large = resize(draw(scene), 256 * factor, 256 * factor)
        assert {"texture", "rims"} <= failed(large, scene)
        assert not {"objects", "shapes", "colours", "sizes"} & failed(large, scene)


def test_an_enlarged_plain_picture_fails_its_rims():
    for scene in SCENES[:10]:
        scene = replace(scene, texture="plain")
        assert failed(resize(draw(scene), 512, 512), scene) == {"rims"}


@pytest.mark.parametrize("texture", TEXTURED)
def test_a_smooth_picture_fails_its_texture(texture):
    scene = replace(SCENE, texture=texture)
    assert {"texture", "rims"} <= failed(blur(draw(scene)[None].float(), 4.0)[0].byte(), scene)
    assert failed(draw(replace(scene, texture="plain")), scene) == {"texture"}


@pytest.mark.parametrize("texture", TEXTURED)
def test_texture_in_half_of_the_picture_fails(texture):
    scene = replace(SCENE, texture=texture)
    picture = draw(scene)
    picture[:, 128:] = draw(replace(scene, texture="plain"))[:, 128:]
    assert failed(picture, scene) == {"texture"}


def test_light_across_both_axes_fails():
    picture = draw(replace(SCENE, light="even")).float()
    ramp = torch.linspace(1.0, 0.72, 256)
    assert "light" in failed((picture * ramp * ramp[:, None]).byte(), SCENE)


def test_a_picture_that_is_none():
    for picture in (torch.zeros(3, 256, 256), np.zeros((256, 256, 3), np.uint8)):
        with pytest.raises(ValueError, match="is not 8-bit sRGB of shape 3 x H x W"):
            check_scene(picture, SCENE)
    message = "176 x 256 is too small to read; its sides must be at least 192 pixels"
    with pytest.raises(ValueError, match=message):
        check_scene(torch.zeros(3, 176, 256, dtype=torch.uint8), SCENE)


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("light", LIGHTS)
def test_a_reading_says_where_what_is(shape, light):
    thing = SceneObject("medium", "teal", shape, 0.37, 0.61, 0.26)
    reading = read_picture(draw(replace(SCENE, objects=(thing,), light=light), 256, 320))
    (found,) = reading.objects
    assert (found.size, found.colour, found.shape) == ("medium", "teal", shape)
    assert (found.x, found.y) == pytest.approx((0.37, 0.61), abs=0.005)
    assert found.extent == pytest.approx(0.26, abs=0.01)
    assert found.rim_pixels == pytest.approx(3, abs=0.8)
    assert (reading.texture, reading.background, reading.light) == ("striped", "green", light)


def test_components():
    mask = torch.tensor(
        [
            [1, 1, 0, 0, 1],
            [0, 1, 0, 1, 1],
            [0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0],
            [1, 0, 1, 1, 1],
            [0, 1, 0, 0, 0],
        ]
    ).bool()
    parts = find_components(mask.numpy(), 1)
    assert [int(part.mask.sum()) for part in parts] == [9, 3, 1, 1]
    assert [(part.top, part.left) for part in parts[:2]] == [(0, 0), (4, 2)]
    assert np.array_equal(parts[0].mask, mask[:3].numpy())
    assert len(find_components(mask.numpy(), 3)) == 2
    assert find_components(np.zeros((4, 4), bool), 1) == []


def test_components_of_noise_are_those_of_a_flood():
    rng = np.random.default_rng(0)
    mask = rng.random((40, 50)) < 0.55
    sizes, left = [], {tuple(each) for each in np.argwhere(mask)}
    while left:
        stack, size = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            size += 1
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        sizes.append(size)
    assert [part.mask.sum() for part in find_components(mask, 1)] == sorted(sizes, reverse=True)


# --- the score ------------------------------------------------------------------------------------


def report(passed):
    return SceneReport(*[True] * 8, passed)


def test_score_has_wilsons_interval():
    found = score([report(True)] * 45 + [report(False)] * 5)
    assert astuple(found) == pytest.approx((0.9, 0.7864, 0.9565, 50), abs=1e-4)
    none = score([report(False)] * 10)
    assert (none.share, none.low) == (0, 0)
    assert none.high == pytest.approx(0.2775, abs=1e-4)
    assert score([report(True)]).high == 1
    with pytest.raises(ValueError, match="there is no report to score"):
        score([])


def test_pictures_of_one_caption_are_no_independent_ones():
    def interval(*passed, num_captions):
        found = score([report(each) for each in passed], num_captions=num_captions)
        return found.high - found.low

    half = [True, False] * 20
    once = interval(*half, num_captions=40)
    alike = interval(*half * 3, num_captions=40)  # all noises of a caption agree
    assert alike == pytest.approx(once, rel=0.02)
    generator = random.Random(0)
    drawn = [generator.random() < 0.5 for _ in range(1200)]
    apart, pooled = interval(*drawn, num_captions=400), interval(*drawn, num_captions=1200)
    assert pooled <= apart < 1.15 * pooled


def test_a_report_passes_if_every_part_holds():
    assert report(True).passed
    for part in vars(report(True)):
        assert not replace(report(True), **{part: False}).passed
