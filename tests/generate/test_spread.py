import pytest

from urae.backbones.context_parallel import list_degrees
from urae.backbones.flux import build_meta_models
from urae.generate.config import GenerateConfig
from urae.generate.inputs import Sampling
from urae.generate.parts import Part
from urae.generate.spread import Degrees, choose_spread, find_degrees, spread_pictures
from urae.resolution import ResolutionPolicy

FLUX = list_degrees(24, 65536, 512)


def test_which_ranks_can_share_a_picture():
    assert FLUX == [1, 2, 4, 8]
    assert list_degrees(24, 3 * 4096, 3 * 128) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert list_degrees(24, 65536, 77) == [1]


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("num_pictures", range(1, 20))
def test_every_picture_is_made_once(num_pictures, num_ranks):
    spread = spread_pictures(num_pictures, num_ranks, FLUX)
    whole = [n for rank in range(num_ranks) for n in spread.list_whole(rank)]
    assert sorted(whole) == list(range(spread.num_shared, num_pictures))
    shared = [n for rank in range(num_ranks) for n in spread.list_shared(rank)]
    assert sorted(shared) == sorted([*range(spread.num_shared)] * spread.degree)
    groups = {}
    for rank in range(num_ranks):  # neighbours make the same pictures
        groups.setdefault(rank // spread.degree, set()).add(tuple(spread.list_shared(rank)))
    assert all(len(group) == 1 for group in groups.values())


@pytest.mark.parametrize(
    ("num_pictures", "num_ranks", "degree", "num_shared"),
    [
        (1, 2, 2, 1),
        (2, 2, 1, 0),
        (3, 2, 2, 1),
        (7, 2, 2, 1),
        (2, 4, 2, 2),  # two groups of two
        (3, 4, 4, 3),  # one after the other
        (7, 8, 8, 7),
        (15, 16, 1, 0),  # by eight at a time no sooner than one each
        (2, 3, 1, 0),  # three do not divide FLUX's tokens
    ],
)
def test_what_is_done_first(num_pictures, num_ranks, degree, num_shared):
    spread = spread_pictures(num_pictures, num_ranks, FLUX)
    assert (spread.degree, spread.num_shared) == (degree, num_shared)


def test_no_gpu_is_idle():
    flux = Degrees(FLUX, "its heads")
    assert choose_spread(3, 2, flux).num_busy == 2
    with pytest.raises(
        ValueError,
        match=r"by 5 GPUs, and the job has fewer pictures \(1\): its heads; give --gpus 4",
    ):
        choose_spread(1, 5, flux)
    with pytest.raises(ValueError, match="give --gpus 3, or more"):
        choose_spread(3, 4, Degrees([1], "each alone"))
    with pytest.raises(ValueError, match="give --gpus 8, or more"):
        choose_spread(1, 16, flux)


def test_the_fewest_ranks_that_hold_a_picture():
    assert spread_pictures(1, 2, FLUX).least_degree == 2
    assert spread_pictures(3, 2, FLUX).least_degree == 1
    assert spread_pictures(2, 2, FLUX).least_degree == 1


@pytest.mark.parametrize(
    ("side", "policy", "parts", "allowed"),
    [
        (2048, None, (), [1, 2, 4, 8]),
        (2048, None, ("taylorseer-cache",), [1, 2, 4, 8]),
        (2048, None, ("first-block-cache",), [1]),
        (2048, None, ("mag-cache",), [1]),
        (2048, None, ("local-attention",), [1]),
        (1024, None, ("local-attention",), [1, 2, 4, 8]),  # full at native size
        (2048, ResolutionPolicy(attention="local"), (), [1]),
        (1040, None, (), [1]),  # 65 x 65 tokens
        (2112, None, (), [1, 2, 4, 8]),
        (2112, None, ("progressive",), [1, 2, 4]),  # 66 x 66 tokens in early steps
    ],
)
def test_what_excludes_sharing(side, policy, parts, allowed, tmp_path):
    config = GenerateConfig(prompts=("a",), height=side, width=side, policy=policy)
    chosen = [Part(name) for name in parts]
    transformer = build_meta_models("flux-dev")["transformer"]
    degrees = find_degrees(config, [], Sampling(28, 3.5, 512), chosen, transformer, tmp_path)
    assert degrees.allowed == allowed


def test_an_adapter_may_ask_for_local_attention(expected, tmp_path):
    from urae.adapters.files import read_adapter, write_lora

    path = tmp_path / "local.safetensors"
    policy = ResolutionPolicy(attention="local")
    layers = read_adapter(expected / "dev_2k_lora.safetensors").layers
    write_lora(path, layers, {"urae.policy": policy.to_json()})
    config = GenerateConfig(prompts=("a",), height=2048, width=2048, adapters=(str(path),))
    transformer = build_meta_models("flux-dev")["transformer"]
    degrees = find_degrees(
        config, [read_adapter(path)], Sampling(28, 3.5, 512), (), transformer, tmp_path
    )
    assert degrees.allowed == [1]
    assert "local attention" in degrees.reason
