import logging

import pytest
import torch

from urae.backbones.flux import load_pipeline
from urae.backbones.random_flux import build_meta_flux, write_random_flux


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_flux(tmp_path_factory.mktemp("flux") / "tiny", "tiny", seed=1)


def sample(pipe, prompt="a red circle above a blue square"):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt,
        height=64,
        width=96,
        num_inference_steps=2,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


@pytest.mark.parametrize(
    ("shape", "transformer_size"),
    [("flux-dev", 11_901_408_320), ("flux-schnell", 11_891_178_560)],
)
def test_full_shapes_have_the_published_sizes(shape, transformer_size):
    sizes = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in build_meta_flux(shape).items()
    }
    assert sizes == {
        "transformer": transformer_size,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_without_a_warning_and_generates(folder, caplog, monkeypatch, dtype):
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    pipe = load_pipeline(str(folder), dtype=dtype)
    images = sample(pipe)
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert images.shape == (1, 3, 64, 96)
    assert images.isfinite().all()
    assert images.float().std() > 0.05


def test_weights_follow_from_the_seed(folder, tmp_path):
    same = write_random_flux(tmp_path / "same", "tiny", seed=1)
    other = write_random_flux(tmp_path / "other", "tiny", seed=2)
    for part in ("transformer", "vae"):
        weights = f"{part}/diffusion_pytorch_model.safetensors"
        assert (same / weights).read_bytes() == (folder / weights).read_bytes()
        assert (other / weights).read_bytes() != (folder / weights).read_bytes()


def test_captions_of_shapes_stay_words(folder):
    pipe = load_pipeline(str(folder), dtype=torch.float32, without=("transformer", "vae"))
    caption = "a large red circle"
    for tokenizer, special in ((pipe.tokenizer, 2), (pipe.tokenizer_2, 1)):
        ids = tokenizer(caption).input_ids
        assert len(ids) == 4 + special
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
        assert tokenizer.unk_token_id not in tokenizer("Any text, 100%!").input_ids[:-1]


def test_prompts_matter(folder):
    pipe = load_pipeline(str(folder), dtype=torch.float32)
    assert not torch.equal(sample(pipe), sample(pipe, "a green star"))


def test_refuses_a_folder_with_content(folder):
    with pytest.raises(FileExistsError, match="is not empty; choose a new folder"):
        write_random_flux(folder, "tiny")


def test_refuses_an_unknown_shape(tmp_path):
    with pytest.raises(ValueError, match="shape 'huge' is unknown; choose one of tiny, flux-dev"):
        write_random_flux(tmp_path, "huge")
