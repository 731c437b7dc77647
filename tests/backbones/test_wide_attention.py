"""Attention of a wide head in blocks of queries."""

import pytest
import torch
import torch.nn.functional as F

from urae.backbones.random_flux import build_meta_flux
from urae.backbones.vae_plan import plan_decode
from urae.backbones.wide_attention import attend, attend_in_blocks, count_score_bytes

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SIZE = {"heads": 2, "queries": 10_000, "keys": 2**17, "width": 512}


@pytest.fixture
def three():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, count, 40, generator=generator) for count in (50, 70, 70)]


@pytest.mark.parametrize("rows", [1, 7, 50, 64])
def test_blocks_are_the_attention_of_torch(three, rows, rel):
    assert rel(attend_in_blocks(*three, rows), F.scaled_dot_product_attention(*three)) < 1e-6


@pytest.mark.parametrize("width", [40, 512])
def test_on_a_cpu_it_is_torch_itself(width):
    query, key, value = torch.randn(3, 1, 2, 30, width, dtype=torch.bfloat16)
    wanted = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(attend(query, key, value), wanted)


def test_scores_are_bounded():
    assert count_score_bytes(CUDA, torch.bfloat16, **SIZE) == 8 * 2**27
    few = SIZE | {"queries": 24}  # eight blocks at least
    assert count_score_bytes(CUDA, torch.float16, **few) == 8 * 2 * 3 * 2**17
    short = SIZE | {"queries": 100_000, "keys": 1024}  # no more rows than that
    assert count_score_bytes(CUDA, torch.float16, **short) == 8 * 2 * 2048 * 1024
    assert count_score_bytes(CUDA, torch.float32, **SIZE) == 0
    assert count_score_bytes(CPU, torch.bfloat16, **SIZE) == 0
    assert count_score_bytes(CUDA, torch.bfloat16, **SIZE | {"width": 256}) == 0


def test_the_plan_of_a_gpu_has_them():
    """In half precision; a plan needs no weights, and no GPU."""
    vae = build_meta_flux("flux-dev")["vae"]

    def find_attention(max_gib, num_ranks=1):
        plan = plan_decode(
            vae, 4096, 4096,
            max_bytes=int(max_gib * 2**30), device=CUDA, dtype=torch.bfloat16, num_ranks=num_ranks,
        )  # fmt: skip
        (found,) = (each for each in plan.segments if each.ops[0].kind == "attention")
        return found

    assert find_attention(7).peak_bytes / 2**30 == 6 * 0.25 + 1  # six maps
    assert find_attention(7).stripes == 1
    assert find_attention(7, num_ranks=2).stripes == 2  # which share it
    with pytest.raises(MemoryError, match=r"needs at least 1\.28"):
        find_attention(1.2)
