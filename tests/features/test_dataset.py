from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from urae.features.captions import check_weights, choose_caption
from urae.features.dataset import (
    Sample,
    check_cache,
    list_samples,
    load_embeds,
    load_latents,
)
from urae.features.store import Fingerprints, fingerprint_encoders

DIMS = {"latent_channels": 16, "t5_dim": 32, "clip_dim": 24}
SIZES = [(64, 64)] * 7 + [(32, 128)] * 4 + [(128, 32)] * 2
SAMPLES = [
    Sample(f"{i:02}", Path(f"{i}"), {"prompt": Path()}, *size) for i, size in enumerate(SIZES)
]


def test_the_references_cache_is_read(train_data):
    samples = list_samples(train_data)
    assert [(s.stem, s.height, s.width) for s in samples] == [
        ("image_0", 192, 256),
        ("image_1", 256, 256),
        ("image_2", 256, 128),
        ("image_3", 128, 256),
    ]
    assert all(sorted(s.embed_files) == ["generated_prompt", "prompt"] for s in samples)
    check_cache(samples, **DIMS, resolution=256, fingerprints=Fingerprints("any", "any"))
    mean, std = load_latents(samples[0])
    assert mean.shape == std.shape == (16, 24, 32)
    prompt_embeds, pooled = load_embeds(samples[0].embed_files["prompt"])
    assert prompt_embeds.shape == (48, 32)
    assert pooled.shape == (24,)
    stored = load_file(train_data / "image_0_prompt_embed.safetensors")
    assert torch.equal(prompt_embeds, stored["caption_feature_t5"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latent_channels": 4},
            r"image_0_latent_code.*channels of mean is 16, but this run needs 4",
        ),
        ({"t5_dim": 4096}, r"image_0_\w+_embed.*T5's embeddings is 32, but this run needs 4096"),
        ({"clip_dim": 768}, r"image_0_\w+_embed.*CLIP's embedding is 24, but this run needs 768"),
    ],
)
def test_shapes_must_fit_the_model(train_data, change, message):
    with pytest.raises(ValueError, match=message):
        check_cache(list_samples(train_data), **(DIMS | change))


def test_our_cache_must_fit_model_and_resolution(cached, base_dev):
    samples, prints = list_samples(cached), fingerprint_encoders(Path(base_dev))
    check_cache(samples, **DIMS, resolution=192, fingerprints=prints)
    check_cache(samples, **DIMS)
    with pytest.raises(
        ValueError, match=r"image_0_latent.*resolution is 192, but this run needs 256"
    ):
        check_cache(samples, **DIMS, resolution=256)
    other = Fingerprints("other", prints.text_encoders)
    with pytest.raises(ValueError, match=f"VAE is {prints.vae}, but this run needs other"):
        check_cache(samples, **DIMS, fingerprints=other)
    other = Fingerprints(prints.vae, "other")
    with pytest.raises(ValueError, match=r"image_0_\w+_embed.*text encoders is .* needs other"):
        check_cache(samples, **DIMS, fingerprints=other)


def test_folders_that_cannot_be_trained_on(tmp_path, cached_copy):
    with pytest.raises(ValueError, match=r"has no cached latents .* run `urae cache"):
        list_samples(tmp_path)
    for path in cached_copy.glob("image_2_*_embed.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"image_2_latent_code\S+ has no prompt embeddings"):
        list_samples(cached_copy)
    save_file({"wrong": torch.zeros(2)}, cached_copy / "image_0_latent_code.safetensors")
    with pytest.raises(ValueError, match=r"image_0_latent_code\S+ has no 'mean' with 3 axes"):
        list_samples(cached_copy)


def test_a_cache_that_was_stopped_is_told(cached_copy, caplog):
    whole = list_samples(cached_copy)
    assert not caplog.text
    (cached_copy / "image_2_latent_code.safetensors").unlink()
    assert len(list_samples(cached_copy)) == len(whole) - 1
    assert f"cached captions in {cached_copy} have no picture latents" in caplog.text


def test_embeddings_of_one_length(cached_copy):
    path = cached_copy / "image_3_prompt_embed.safetensors"
    save_file(load_file(path) | {"caption_feature_t5": torch.zeros(16, 32)}, path)
    with pytest.raises(ValueError, match="max_sequence_length is 16, but this run needs 48"):
        check_cache(list_samples(cached_copy), **DIMS)


def test_captions_are_mixed():
    generator = torch.Generator().manual_seed(0)

    def draw(*columns, share=0.2):
        sample = Sample("a", Path(), dict.fromkeys(columns, Path()), 64, 64)
        return Counter(choose_caption(sample, share, generator) for _ in range(2000))

    counts = draw("prompt", "generated_prompt")
    assert set(counts) == {"prompt", "generated_prompt"}
    assert abs(counts["prompt"] - 400) < 90  # five standard deviations of the binomial
    counts = draw("prompt", "a", "b")
    assert abs(counts["a"] - 800) < 110 and abs(counts["b"] - 800) < 110
    assert draw("prompt") == {"prompt": 2000}
    assert draw("a") == {"a": 2000}
    assert draw("prompt", "a", share=1.0) == {"prompt": 2000}
    assert draw("prompt", "a", share=0.0) == {"a": 2000}


def test_captions_are_drawn_by_weight():
    generator = torch.Generator().manual_seed(0)

    def draw(columns, **weights):
        sample = Sample("a", Path(), dict.fromkeys(columns, Path()), 64, 64)
        return Counter(choose_caption(sample, 0.2, generator, weights) for _ in range(2000))

    counts = draw("abc", a=3, b=1, c=0)
    assert set(counts) == {"a", "b"}
    assert abs(counts["a"] - 1500) < 97  # five standard deviations of the binomial
    assert draw("bc", a=3, b=1) == {"b": 2000}  # what has no weight is not drawn
    counts = draw(["prompt", "b"], prompt=0.1, b=0.1)
    assert abs(counts["prompt"] - 1000) < 112


def test_weights_of_captions_that_are_not_there():
    samples = [
        Sample(
            name, Path(f"{name}_latent_code.safetensors"), dict.fromkeys(columns, Path()), 64, 64
        )
        for name, columns in (("one", ["prompt", "long"]), ("two", ["prompt"]))
    ]
    check_weights(samples, {"prompt": 1, "long": 0})
    message = r"a column 'short', which no picture has; available: long, prompt"
    with pytest.raises(ValueError, match=message):
        check_weights(samples, {"prompt": 1, "short": 1})
    message = r"two_latent_code.safetensors has no caption with a weight .* only prompt; give"
    with pytest.raises(ValueError, match=message):
        check_weights(samples, {"prompt": 0, "long": 1})
