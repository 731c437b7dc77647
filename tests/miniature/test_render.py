from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from urae.miniature.grammar import COLOURS, LIGHTS, SHAPES, TEXTURES
from urae.miniature.render import BACKGROUND_RGB, OBJECT_RGB, render
from urae.miniature.world import Scene, SceneObject, sample_scene

SCENES = [sample_scene(seed) for seed in range(12)]
PLAIN = Scene(
    (SceneObject("large", "red", "circle", 0.5, 0.5, 0.4),), "plain", "grey", "even", seed=1
)


def draw(scene, height=256, width=256):
    return render([scene], height, width)[0].float()


@pytest.mark.parametrize("size", [(256, 256), (128, 320), (208, 112)])
def test_a_batch_is_its_pictures(size):
    batch = render(SCENES, *size)
    assert batch.dtype == torch.uint8
    assert batch.shape == (len(SCENES), 3, *size)
    for scene, picture in zip(SCENES, batch, strict=True):
        assert torch.equal(render([scene], *size)[0], picture)


def test_another_seed_moves_the_texture_only():
    scene = replace(PLAIN, texture="grainy")
    first, second = draw(scene), draw(replace(scene, seed=2))
    assert not torch.equal(first[:, :40], second[:, :40])
    assert torch.equal(first[:, 120:136, 120:136], second[:, 120:136, 120:136])


@pytest.mark.parametrize("scene", SCENES, ids=range(len(SCENES)))
def test_layout_is_relative_to_the_picture(scene):
    small, large = draw(scene, 256, 256), draw(scene, 512, 512)
    coarse = [F.avg_pool2d(each, side) for each, side in ((small, 16), (large, 32))]
    assert (coarse[0] - coarse[1]).abs().mean() < 5  # rims are thinner in the large one


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_texture_is_in_pixels(texture):
    """The top left corner of a larger picture has the same texture, not an enlarged one."""
    scene = replace(PLAIN, texture=texture)
    small, large = draw(scene, 256, 256)[:, :40, :40], draw(scene, 1024, 1024)[:, :40, :40]
    assert torch.equal(small, large)
    assert small.std() > 10


@pytest.mark.parametrize("texture", ["striped", "checked", "dotted"])
def test_patterns_repeat_after_sixteen_pixels(texture):
    picture = draw(replace(PLAIN, texture=texture))
    assert (picture[:, :40, 16:] - picture[:, :40, :-16]).abs().max() <= 1
    assert (picture[:, :40, 8:] - picture[:, :40, :-8]).abs().max() > 20


def test_rims_are_three_pixels_wide():
    for size in (256, 1024):
        row = draw(PLAIN, size, size)[0, size // 2]
        dark = row < 0.7 * row[size // 2]
        assert dark.sum() == pytest.approx(6, abs=1)


@pytest.mark.parametrize("light", LIGHTS)
def test_light_is_brighter_at_its_side(light):
    picture = draw(replace(PLAIN, light=light)).mean(0)
    sides = {
        "left": picture[:, :16],
        "right": picture[:, -16:],
        "top": picture[:16],
        "bottom": picture[-16:],
    }
    means = {name: float(side.mean()) for name, side in sides.items()}
    if light == "even":
        assert max(means.values()) - min(means.values()) < 1
    else:
        assert max(means, key=means.get) == light


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_objects_fill_their_box(shape, colour):
    thing = SceneObject("medium", colour, shape, 0.4, 0.55, 0.28)
    picture = draw(replace(PLAIN, objects=(thing,)), 160, 240)
    changed = (picture != draw(replace(PLAIN, objects=()), 160, 240)).any(0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    assert columns.float().mean() + 0.5 == pytest.approx(0.4 * 240, abs=0.6)
    assert rows.float().mean() + 0.5 == pytest.approx(0.55 * 160, abs=0.6)
    assert columns.max() - columns.min() + 1 == pytest.approx(0.28 * 160, abs=2)


def test_brightness_changes_but_not_the_ratios_of_channels():
    scene = replace(PLAIN, texture="checked", light="left")
    for rgb, pixels in (
        (BACKGROUND_RGB["grey"], draw(scene)[:, :40]),
        (OBJECT_RGB["red"], draw(scene)[:, 100:156, 100:156]),
    ):
        wanted = torch.tensor(rgb)[:, None, None] / sum(rgb)
        assert (pixels / pixels.sum(0) - wanted).abs().max() < 0.005


def test_nothing_is_clipped():
    for scene in SCENES:
        assert draw(replace(scene, light="right")).max() < 255.5
    assert max(draw(replace(PLAIN, background=name)).max() for name in BACKGROUND_RGB) < 255


def test_no_scene_and_no_such_size():
    with pytest.raises(ValueError, match="there is no scene to render"):
        render([], 256, 256)
    with pytest.raises(ValueError, match="width 250 is not a positive multiple of 16"):
        render(SCENES, 256, 250)


@pytest.mark.gpu
def test_a_gpu_renders_the_same():
    difference = render(SCENES, 256, 256, device="cuda").cpu().int() - render(SCENES, 256, 256)
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.01
