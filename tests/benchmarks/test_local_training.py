import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import local_training
from local_training import build_training, build_variants

from urae.local_attention import build_local_attention

CPU = torch.device("cpu")


@pytest.fixture
def pattern():
    """Blocks of 128 tokens that are seen whole, in part and not at all."""
    return build_local_attention(32, 32, 64, 16, CPU)


def test_a_few_blocks_are_built():
    transformer = build_training(local_training.TINY, "full", torch.empty(0))
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (
        1,
        2,
    )


@pytest.mark.filterwarnings("ignore")  # FlexAttention would rather be compiled
def test_variants_are_the_same_attention(pattern, rel):
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, len(pattern.groups), 2, 16, generator=generator) for _ in range(3)]
    found = {name: attend(*heads) for name, attend in build_variants(pattern, on_gpu=False).items()}
    wanted = found.pop("as it is")
    for name, output in found.items():
        assert rel(output, wanted) < 1e-6, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the profiler's, and FlexAttention's
def test_a_small_shape_on_a_cpu(monkeypatch, capsys):
    arguments = ["local_training.py", "--side", "192", "--text", "8", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    local_training.main()
    text = capsys.readouterr().out
    assert "| local attention, checkpointing selective |" in text
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in text
    assert "| safe, autotuned |" in text
