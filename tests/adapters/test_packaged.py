"""Adapters that come with the package, by name; stand-ins take the place of the weights."""

import pytest
import torch

import urae
from urae.adapters.files import LowRank, read_adapter, write_lora
from urae.adapters.packaged import FILES, PACKAGED_ADAPTERS, pick_adapters
from urae.adapters.sources import resolve_adapter
from urae.resolution import find_policy


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Both adapters, for the tiny base."""
    generator = torch.Generator().manual_seed(0)
    for name, file in FILES.items():
        pair = LowRank(
            torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
        )
        write_lora(tmp_path / "ships" / file, {"transformer_blocks.0.attn.to_q": pair})
        monkeypatch.setitem(PACKAGED_ADAPTERS, name, tmp_path / "ships" / file)
    return PACKAGED_ADAPTERS


def test_a_name_goes_where_a_file_goes(packaged, load_pipe):
    assert resolve_adapter("miniature-2k") == packaged["miniature-2k"]
    pipe = urae.adapt(load_pipe(), ["miniature-2k", "miniature-4k"])
    assert find_policy(pipe.transformer).adapted.names == ("urae_2k", "urae_4k")
    assert read_adapter("miniature-4k").path == packaged["miniature-4k"]


def test_an_existing_path_wins(packaged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "miniature-2k" / "mine.safetensors"
    own.parent.mkdir()
    own.write_bytes(b"")
    assert resolve_adapter("miniature-2k").resolve() == own


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"known names: miniature-2k, miniature-4k$"):
        resolve_adapter("miniature-8k")


@pytest.mark.parametrize(
    ("height", "width", "names"),
    [
        (256, 256, ()),
        (128, 512, ()),
        (272, 256, ("miniature-2k",)),
        (512, 512, ("miniature-2k",)),
        (256, 1024, ("miniature-2k",)),
        (528, 512, ("miniature-2k", "miniature-4k")),
        (2048, 2048, ("miniature-2k", "miniature-4k")),
    ],
)
def test_which_a_size_takes(height, width, names):
    assert pick_adapters(height, width, 256) == names
