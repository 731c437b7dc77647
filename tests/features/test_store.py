import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from urae.features.store import (
    LATENT_KEYS,
    Status,
    checksum,
    embed_path,
    find_status,
    fingerprint_encoders,
    read_features,
    read_header,
    split_embed_name,
    write_features,
)

TENSORS = {"mean": torch.ones(16, 4, 6), "std": torch.zeros(16, 4, 6)}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a_latent_code.safetensors"
    write_features(path, TENSORS, {"resolution": "64"})
    header = read_header(path)
    assert header.metadata == {
        "urae_features": "1",
        "crc32": checksum(TENSORS),
        "resolution": "64",
    }
    assert header.shapes == {"mean": (16, 4, 6), "std": (16, 4, 6)}
    tensors = read_features(path, LATENT_KEYS)
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_content_is_the_same_bytes(tmp_path):
    """The library writes metadata in the order of a hash map, another in each process."""
    metadata = {f"key {number}": "é" * number for number in range(20)}
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {"mean": torch.rand(2, 3), "std": torch.rand(2, 3)}
    write_features(first, tensors, metadata)
    write_features(second, tensors, dict(reversed(metadata.items())))
    assert first.read_bytes() == second.read_bytes()
    assert {**read_header(first).metadata, **metadata} == read_header(first).metadata
    assert torch.equal(read_features(first, ["mean", "std"])["std"], tensors["std"])


def test_status(tmp_path):
    path = tmp_path / "a_latent_code.safetensors"
    assert find_status(path, {}) is Status.DUE
    save_file(TENSORS, path)
    assert find_status(path, {"resolution": "64"}) is Status.FOREIGN
    write_features(path, TENSORS, {"resolution": "64", "model": "m"})
    assert find_status(path, {"resolution": "64"}) is Status.CURRENT
    assert find_status(path, {"resolution": "80"}) is Status.DUE
    path.write_bytes(path.read_bytes()[:-1])
    assert find_status(path, {"resolution": "64"}) is Status.DUE


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_features_are_named(tmp_path, size):
    path = tmp_path / "a_latent_code.safetensors"
    write_features(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:size])
    for read in (read_header, lambda path: read_features(path, LATENT_KEYS)):
        with pytest.raises(ValueError, match=r"a_latent_code\.safetensors cannot be used.*delete"):
            read(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a_latent_code.safetensors"
    write_features(path, TENSORS, {})
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its bytes have changed since it was written; delete"):
        read_features(path, LATENT_KEYS)
    save_file(TENSORS, path)  # the reference's have no checksum
    read_features(path, LATENT_KEYS)


def test_features_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "a_latent_code.safetensors"
    broken = TENSORS | {"mean": torch.full((16, 4, 6), torch.nan)}
    with pytest.raises(ValueError, match=r"'mean' for a_latent_code\.safetensors.*not finite"):
        write_features(path, broken, {})
    assert not path.exists()
    save_file(broken, path)
    with pytest.raises(ValueError, match=r"a_latent_code\.safetensors cannot be used: 'mean'"):
        read_features(path, LATENT_KEYS)
    save_file({"mean": TENSORS["mean"]}, path)
    with pytest.raises(ValueError, match="it has no 'std', only mean"):
        read_features(path, LATENT_KEYS)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a_latent_code.safetensors"
    write_features(path, TENSORS, {})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left for") as caught:
        write_features(path, TENSORS, {"resolution": "64"})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_embed_names_split_at_the_longest_stem(tmp_path):
    name = embed_path(tmp_path, "image_1", "generated_prompt").name
    assert name == "image_1_generated_prompt_embed.safetensors"
    assert split_embed_name(name, {"image", "image_1"}) == ("image_1", "generated_prompt")
    assert split_embed_name(name, {"image"}) == ("image", "1_generated_prompt")
    assert split_embed_name(name, {"other"}) is None


def test_fingerprints_tell_encoders_apart(base_dev, tmp_path):
    prints = fingerprint_encoders(Path(base_dev))
    assert prints == fingerprint_encoders(Path(shutil.copytree(base_dev, tmp_path / "model")))
    (tmp_path / "model" / "tokenizer_2" / "tokenizer.json").write_text("{}")
    changed = fingerprint_encoders(tmp_path / "model")
    assert changed.vae == prints.vae
    assert changed.text_encoders != prints.text_encoders
