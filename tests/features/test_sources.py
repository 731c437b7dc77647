import json

import pytest
from PIL import Image

from urae.features.sources import find_sources


def add(folder, name, caption=None, suffix=".json"):
    path = folder / name
    Image.new("RGB", (8, 8)).save(path)
    if caption is not None:
        text = caption if isinstance(caption, str) else json.dumps(caption)
        path.with_suffix(suffix).write_text(text, encoding="utf-8")
    return path


def test_every_text_column_is_a_caption(tmp_path):
    add(tmp_path, "a.png", {"prompt": "p", "generated_prompt": "g", "translated": "t"})
    add(tmp_path, "b.PNG", " a cat \n", suffix=".txt")
    add(tmp_path, "c.v2.webp", "\ufeff" + json.dumps({"prompt": "Grüße"}))
    sources, skips = find_sources(tmp_path)
    assert [source.captions for source in sources] == [
        {"prompt": "p", "generated_prompt": "g", "translated": "t"},
        {"prompt": "a cat"},
        {"prompt": "Grüße"},
    ]
    assert [source.stem for source in sources] == ["a", "b", "c.v2"]
    assert sources[2].embed_path("prompt").name == "c.v2_prompt_embed.safetensors"
    assert skips == []


@pytest.mark.parametrize(
    ("caption", "reasons"),
    [
        (None, ["missing caption"]),
        ("{", ["unreadable caption"]),
        ("[1]", ["unreadable caption"]),
        ({}, ["missing caption"]),
        ({"prompt": " "}, ["empty caption", "missing caption"]),
        ({"prompt": 3}, ["caption is not text", "missing caption"]),
        ({"prompt": None, "generated_prompt": "g"}, ["caption is not text"]),
        ({"../prompt": "p", "prompt": "p"}, ["column not usable in a file name"]),
        ({"prompt": "\ud83d", "generated_prompt": "g"}, ["unreadable caption"]),
    ],
)
def test_captions_that_are_left_out(tmp_path, caption, reasons):
    add(tmp_path, "a.png", {"prompt": "good"})
    add(tmp_path, "b.png", caption)
    sources, skips = find_sources(tmp_path)
    assert [skip.reason for skip in skips] == reasons
    assert all(skip.file.startswith("b.") for skip in skips)
    assert (len(sources) == 1) == ("missing caption" in reasons or caption in ("{", "[1]"))


def test_bytes_that_are_no_text(tmp_path):
    add(tmp_path, "a.png", {"prompt": "good"})
    add(tmp_path, "b.png").with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    (skip,) = find_sources(tmp_path)[1]
    assert skip.reason == "unreadable caption"
    assert skip.detail == "b.txt is not UTF-8; save it as UTF-8"


def test_captions_as_peers_keep_them_are_told(tmp_path):
    add(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a"}')
    with pytest.raises(
        ValueError, match=r"none of the 1 images .*; captions in metadata.jsonl are"
    ):
        find_sources(tmp_path)
    add(tmp_path, "b.png", "b", suffix=".txt")
    _, skips = find_sources(tmp_path)
    assert ("metadata.jsonl", "captions not read") in {(skip.file, skip.reason) for skip in skips}


def test_other_formats_are_reported(tmp_path):
    add(tmp_path, "a.png", {"prompt": "good"})
    add(tmp_path, "b.tiff")
    add(tmp_path, ".hidden.png")
    _, skips = find_sources(tmp_path)
    assert [(skip.file, skip.reason) for skip in skips] == [("b.tiff", "unsupported format")]


def test_folders_without_work(tmp_path):
    with pytest.raises(ValueError, match=r"gone does not exist.*expected images \(\.avif"):
        find_sources(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"has no images; it holds nothing; expected"):
        find_sources(tmp_path)
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match=r"has no images; it holds 1 \.md; expected"):
        find_sources(tmp_path)
    add(tmp_path, "a.png")
    message = r"none of the 1 images .* has a caption \(first: a\.png: there is neither a\.json"
    with pytest.raises(ValueError, match=message):
        find_sources(tmp_path)


def test_names_that_collide(tmp_path):
    add(tmp_path, "a.png", {"prompt": "p"})
    add(tmp_path, "a.jpg")
    with pytest.raises(ValueError, match=r"images a\.jpg and a\.png would share one cache"):
        find_sources(tmp_path)
    (tmp_path / "a.jpg").unlink()
    add(tmp_path, "a_b.png")
    (tmp_path / "a.json").write_text(json.dumps({"b_prompt": "p"}))
    with pytest.raises(
        ValueError, match=r"column 'b_prompt' of a\.png would be mistaken for that of"
    ):
        find_sources(tmp_path)
