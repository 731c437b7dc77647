import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest

from urae.miniature.grammar import VOCABULARY, Description, ObjectWords, parse_caption
from urae.miniature.sources import PARTS, make_vague, make_wrong
from urae.miniature.world import EXTENTS, caption, find_relation, sample_scene, training_scene

SCENES = [sample_scene(seed) for seed in range(500)]


def test_captions_are_read_back():
    for scene in SCENES:
        assert parse_caption(caption(scene)) == scene.description


def test_vague_captions_are_read_back():
    rng = random.Random(0)
    for scene in SCENES:
        vague = make_vague(scene.description, rng)
        assert parse_caption(caption(vague)) == vague


def test_captions_are_made_of_the_vocabulary():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    said = {word for scene in SCENES for word in caption(scene).replace(",", "").split()}
    assert said | {"and", "an"} == set(VOCABULARY)


def test_a_caption_by_hand():
    read = parse_caption(
        "A large red circle left of a small blue square on a striped green background."
    )
    assert read == Description(
        (ObjectWords("large", "red", "circle"), ObjectWords("small", "blue", "square")),
        ("left of",),
        texture="striped",
        background="green",
        light=None,
    )


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a ring", "a ring"),
        ("an orange ring and a cross", "an orange ring and a cross"),
        ("a ring above a cross below a circle", "a ring above a cross, which is below a circle"),
        ("a ring, on a plain background", "a ring on a plain background"),
        ("a ring on a pink background in even light", "a ring on a pink background, in even light"),
        ("a small ring, lit from the top", "a small ring, lit from the top"),
    ],
)
def test_what_may_be_left_out(text, written):
    assert caption(parse_caption(text)) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has its end where an object is expected; allowed: a, an$"),
        ("a huge circle", "has 'huge' where an object is expected; allowed: small, .*, circle"),
        ("a red small circle", "has 'small' where an object is expected; allowed: circle, square"),
        (
            "a circle near a ring",
            "has 'near' where the end is expected; allowed: left of, right of",
        ),
        ("a circle right a ring", "has 'right' where a relation is expected; allowed: left of"),
        ("a circle on a wooden background", "has 'wooden' where a background is expected"),
        ("a circle on a teal background", "allowed: plain, .*, grey, green, .*, background$"),
        ("a circle, lit from the front", "has 'front' where a light is expected; allowed: left"),
        ("a circle in even light please", "has 'please' where the end is expected$"),
        ("a ring and a ring and a ring and a ring", "names 4 objects, but a scene has at most 3"),
    ],
)
def test_what_is_no_caption(text, message):
    with pytest.raises(ValueError, match=message):
        parse_caption(text)


def test_a_seed_gives_the_same_scene_on_every_python():
    assert sample_scene(7) == sample_scene(7) != sample_scene(8)
    scene = sample_scene(0)
    assert caption(scene) == (
        "a large purple diamond right of a small red cross, which is above a small yellow circle "
        "on a grainy green background, lit from the right"
    )
    assert scene.seed == 212092662
    assert scene.objects[0].x == pytest.approx(0.6488702850656152, abs=1e-12)


def test_scenes_have_one_to_three_objects_of_different_colours_and_training_more():
    counts = Counter(len(scene.objects) for scene in SCENES)
    for number, share in ((1, 0.4), (2, 0.4), (3, 0.2)):
        assert counts[number] / len(SCENES) == pytest.approx(share, abs=0.06)
    counts = Counter(len(training_scene(1, index).objects) for index in range(500))
    for number, share in ((1, 0.25), (2, 0.25), (3, 0.5)):
        assert counts[number] / 500 == pytest.approx(share, abs=0.06)
    for scene in SCENES:
        assert len({each.colour for each in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3)])
def test_objects_are_apart_and_inside_in_every_shape_of_picture(shape):
    height, width = shape
    side = min(shape)
    for scene in SCENES:
        boxes = [(each.x * width, each.y * height, each.extent * side) for each in scene.objects]
        for x, y, extent in boxes:
            assert extent / 2 + 0.03 * side < x < width - extent / 2 - 0.03 * side
            assert extent / 2 + 0.03 * side < y < height - extent / 2 - 0.03 * side
        for (x, y, extent), (other_x, other_y, other_extent) in combinations(boxes, 2):
            gap = max(abs(x - other_x), abs(y - other_y)) - (extent + other_extent) / 2
            assert gap > 0.04 * side


def test_sizes_do_not_overlap():
    extents = {
        size: [o.extent for scene in SCENES for o in scene.objects if o.size == size]
        for size in EXTENTS
    }
    assert max(extents["small"]) < 0.19 < 0.25 < min(extents["medium"])
    assert max(extents["medium"]) < 0.29 < 0.37 < min(extents["large"])


def test_relations_are_clear():
    assert find_relation(-0.2, 0.1) == "left of"
    assert find_relation(0.2, 0.1) == "right of"
    assert find_relation(0.1, -0.2) == "above"
    assert find_relation(0.1, 0.2) == "below"
    for scene in SCENES:
        for a, b in zip(scene.objects, scene.objects[1:], strict=False):
            near, far = sorted((abs(a.x - b.x), abs(a.y - b.y)))
            assert far >= 1.6 * near


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_word_is_one_word(part):
    rng = random.Random(0)
    for scene in SCENES[:100]:
        if part == "relation" and len(scene.objects) == 1:
            continue
        said, wrong = (caption(each) for each in (scene, make_wrong(scene.description, part, rng)))
        assert said != wrong
        assert parse_caption(wrong)
        if part not in ("relation", "light"):
            pairs = zip(said.split(), wrong.split(), strict=True)
            assert sum(a != b for a, b in pairs) == 1


def test_a_scene_says_what_its_objects_are():
    scene = next(scene for scene in SCENES if len(scene.objects) == 2)
    swapped = replace(scene, objects=scene.objects[::-1])
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert swapped.description.relations == (opposite[scene.description.relations[0]],)
