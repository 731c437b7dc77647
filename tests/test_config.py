"""What Python passes to the configs is checked as strictly as what TOML says."""

from pathlib import Path

import pytest

from urae.adapters.convert import ConvertConfig
from urae.features.cache import CacheConfig
from urae.generate import GenerateConfig
from urae.train import TrainConfig
from urae.train.config import AdapterConfig, OptimizerConfig

PLACES = {"data_dir": Path("data"), "output_dir": Path("run")}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: GenerateConfig(("a",), memory="8 bit"),
            "memory: Input should be 'auto', .* not '8",
        ),
        (
            lambda: GenerateConfig("a lighthouse"),
            "prompts: Input should be a valid tuple, not 'a l",
        ),
        (lambda: GenerateConfig(("a", 1)), "prompts.1: Input should be a valid string, not 1$"),
        (lambda: AdapterConfig(kind="rola"), "kind: Input should be 'lora', .* not 'rola'$"),
        (lambda: OptimizerConfig(name="sgd"), "name: Input should be 'prodigy', .* not 'sgd'$"),
        (lambda: TrainConfig("flux-dev", **PLACES, steps=2.5), "steps: .* not 2.5$"),
        (lambda: CacheConfig(Path("a"), "flux-dev", "2k"), "resolution: .* not '2k'$"),
    ],
)
def test_wrong_types_are_told_by_field(build, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_lists_and_texts_stand_for_tuples_and_paths():
    config = ConvertConfig(["my_2k", "my_4k"], "my_4k.safetensors")
    assert config == ConvertConfig(("my_2k", "my_4k"), Path("my_4k.safetensors"))


def test_what_a_recipe_takes_is_taken_from_python():
    assert AdapterConfig(over="miniature-2k").over == ("miniature-2k",)
    config = TrainConfig("miniature-dev", "features", "run", preview_prompts="a red circle")
    assert config.data_dir == Path("features")
    assert config.preview_prompts == ("a red circle",)
