import math
import warnings

import pytest
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from safetensors.torch import load_file

from urae.backbones.flux import load_transformer
from urae.geometry import build_image_ids, build_text_ids
from urae.resolution import (
    ResolutionPolicy,
    apply_policy,
    find_policy,
    read_base_policy,
    remove_policy,
    shift_scheduler,
)

NO_POLICY = ResolutionPolicy(ntk_factor=1.0, proportional_attention=False)


@pytest.mark.parametrize("size", ["8x8", "10x24"])
@pytest.mark.parametrize("ntk", [1, 10])
@pytest.mark.parametrize("proportional", [0, 1])
@torch.no_grad()
def test_forward_equals_the_reference(base, bases, expected, rel, size, ntk, proportional):
    golden = load_file(expected / f"{base}_transformer_forward.safetensors")
    transformer = load_transformer(bases[base], dtype=torch.float32)
    apply_policy(
        transformer,
        ResolutionPolicy(ntk_factor=float(ntk), proportional_attention=bool(proportional)),
    )
    names = (
        "hidden_states encoder_hidden_states pooled_projections timestep guidance img_ids txt_ids"
    )
    inputs = {name: golden.get(f"{size}.{name}") for name in names.split()}
    output = transformer(**inputs, return_dict=False)[0]
    assert rel(output, golden[f"{size}.output.ntk{ntk}.proportional{proportional}"]) < 1e-5


def test_attention_scale_is_one_at_the_native_length():
    policy = ResolutionPolicy()
    assert policy.attention_scale(4608) == 1
    # the reference notes: x1.074 at 2K, x1.147 at 4K
    assert policy.attention_scale(512 + 128**2) == pytest.approx(1.074, abs=5e-4)
    assert policy.attention_scale(512 + 256**2) == pytest.approx(1.147, abs=5e-4)
    assert ResolutionPolicy(proportional_attention=False).attention_scale(99999) == 1


def test_positions_scale_the_logits_exactly(load_pipe):
    transformer = load_pipe().transformer
    ids = torch.cat([build_text_ids(7), build_image_ids(5, 6)])
    stock = transformer.pos_embed(ids)
    policy = ResolutionPolicy(ntk_factor=1.0, native_sequence_length=100)
    scaled = apply_policy(transformer, policy)(ids)
    wanted = math.sqrt(math.log(37) / math.log(100))
    for before, after in zip(stock, scaled, strict=True):
        # a logit has two rotated factors
        assert torch.allclose(after, before * math.sqrt(wanted), rtol=1e-6)


@pytest.mark.parametrize(
    ("native_length", "enlargement", "wanted"), [(4608, 2, 8.3), (4608, 4, 69.2), (320, 2, 50.5)]
)
def test_the_frequency_of_half_a_turn_is_slowed_by_the_enlargement(
    native_length, enlargement, wanted
):
    policy = ResolutionPolicy(ntk_factor="auto", native_sequence_length=native_length)
    side, theta = policy.native_side, 10_000
    assert policy.rope_factor(side**2, theta) == 1
    assert policy.rope_factor(side**2 // 4, theta) == 1
    factor = policy.rope_factor((enlargement * side) ** 2, theta)
    assert factor == pytest.approx(wanted, rel=1e-2)
    x = math.log(side / math.pi) / math.log(theta)  # of theta^-x = pi / side
    assert (theta * factor) ** -x == pytest.approx(math.pi / side / enlargement)


@torch.no_grad()
def test_positions_of_each_picture_follow_its_own_size(load_pipe):
    transformer = load_pipe().transformer
    policy = ResolutionPolicy("auto", proportional_attention=False, native_sequence_length=80)
    seen = []
    positions = apply_policy(transformer, policy)
    positions.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    stock = positions.stock
    for side in (8, 16, 8):
        transformer(
            hidden_states=torch.randn(1, side * side, 64),
            encoder_hidden_states=torch.randn(1, 4, 32),
            pooled_projections=torch.randn(1, 24),
            timestep=torch.ones(1),
            guidance=torch.ones(1),
            img_ids=build_image_ids(side, side),
            txt_ids=build_text_ids(4),
        )
        factor = policy.rope_factor(side * side, stock.theta)
        like = type(stock)(theta=stock.theta * factor, axes_dim=stock.axes_dim)
        ids, output = seen[-1]
        assert all(map(torch.equal, output, like(ids)))
        assert all(map(torch.equal, output, stock(ids))) == (side == 8)


@torch.no_grad()
@pytest.mark.parametrize("batched", [False, True])
def test_reference_pictures_do_not_make_a_picture_larger(load_pipe, batched):
    transformer = load_pipe().transformer
    policy = ResolutionPolicy("auto", native_sequence_length=80)
    positions = apply_policy(transformer, policy)
    ids = build_image_ids(8, 8)
    both = torch.cat([ids, ids + torch.tensor([1.0, 0, 0])])  # Kontext's, with one reference
    transformer(
        hidden_states=torch.randn(1, 128, 64),
        encoder_hidden_states=torch.randn(1, 4, 32),
        pooled_projections=torch.randn(1, 24),
        timestep=torch.ones(1),
        guidance=torch.ones(1),
        img_ids=both[None] if batched else both,
        txt_ids=build_text_ids(4),
    )
    assert positions.rope.theta == positions.stock.theta
    assert positions.sequence_length == 132  # attention sees them all


@torch.no_grad()
def test_forward_widens_ids_before_the_position_module(load_pipe):
    transformer = load_pipe().transformer.bfloat16()
    seen = []
    positions = apply_policy(transformer, ResolutionPolicy())
    positions.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    transformer(
        hidden_states=torch.randn(1, 300, 64).bfloat16(),
        encoder_hidden_states=torch.randn(1, 4, 32).bfloat16(),
        pooled_projections=torch.randn(1, 24).bfloat16(),
        timestep=torch.ones(1),
        guidance=torch.ones(1),
        img_ids=build_image_ids(1, 300).bfloat16(),
        txt_ids=build_text_ids(4).bfloat16(),
    )
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0][4:], build_image_ids(1, 300))


@torch.no_grad()
def test_global_length_when_the_module_sees_a_part(load_pipe):
    """Context parallelism splits ids inside the forward, after the hook has counted them."""
    transformer = load_pipe().transformer
    positions = apply_policy(transformer, ResolutionPolicy(ntk_factor=1.0))
    ids = torch.cat([build_text_ids(4), build_image_ids(8, 8)])
    positions.prepare_forward(
        transformer, (), {"img_ids": build_image_ids(8, 8), "txt_ids": build_text_ids(4)}
    )
    whole, half = positions(ids)[0], positions(ids[:34])[0]
    assert torch.equal(whole[:34], half)


def test_remove_gives_the_stock_module_back(load_pipe):
    transformer = load_pipe().transformer
    stock = transformer.pos_embed
    apply_policy(transformer, ResolutionPolicy())
    apply_policy(transformer, NO_POLICY)
    assert find_policy(transformer).policy == NO_POLICY
    remove_policy(transformer)
    assert transformer.pos_embed is stock
    assert not transformer._forward_pre_hooks
    remove_policy(transformer)


@torch.no_grad()
def test_a_controlnet_follows_too(load_pipe):
    controlnet = FluxControlNetModel.from_transformer(
        load_pipe().transformer, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 64, 64),
        "controlnet_cond": torch.randn(1, 64, 64),
        "encoder_hidden_states": torch.randn(1, 4, 32),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": build_image_ids(8, 8),
        "txt_ids": build_text_ids(4),
    }
    for block in controlnet.controlnet_blocks:
        torch.nn.init.normal_(block.weight)
    stock = controlnet(**inputs, return_dict=False)[0][0]
    apply_policy(controlnet, ResolutionPolicy())
    assert not torch.allclose(controlnet(**inputs, return_dict=False)[0][0], stock)
    remove_policy(controlnet)
    assert torch.equal(controlnet(**inputs, return_dict=False)[0][0], stock)


def test_time_shift(load_pipe):
    stock = load_pipe("dev").scheduler
    assert stock.config.use_dynamic_shifting
    static = shift_scheduler(stock, ResolutionPolicy())
    assert (static.config.use_dynamic_shifting, static.config.shift) == (False, 3.0)
    ten = shift_scheduler(stock, ResolutionPolicy(time_shift=10))
    assert (ten.config.use_dynamic_shifting, ten.config.shift) == (False, 10.0)
    dynamic = shift_scheduler(static, ResolutionPolicy(time_shift="dynamic"))
    assert dynamic.config == stock.config
    assert stock.config.use_dynamic_shifting


def test_a_scheduler_without_shift_is_refused():
    from diffusers import DDIMScheduler

    with pytest.raises(ValueError, match="DDIMScheduler has no shift, use_dynamic_shifting"):
        shift_scheduler(DDIMScheduler(), ResolutionPolicy())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ntk_factor": 0.0}, "ntk_factor 0.0 must be a positive number"),
        ({"ntk_factor": math.nan}, "ntk_factor nan"),
        ({"ntk_factor": "stock"}, "ntk_factor 'stock' must be a positive number or 'auto'"),
        ({"ntk_factor": "auto", "native_sequence_length": 60}, "60 is too short for ntk_factor"),
        ({"native_sequence_length": 1}, "native_sequence_length 1 must be at least 2"),
        ({"time_shift": -1.0}, "time_shift -1.0 must be"),
        ({"time_shift": "static"}, "time_shift 'static' must be"),
    ],
)
def test_policy_values_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        ResolutionPolicy(**fields)


def test_policy_in_metadata():
    policy = ResolutionPolicy(4.0, False, 300, "dynamic")
    assert ResolutionPolicy.from_json(policy.to_json(), "file") == policy
    for text in ('{"ntk": 3}', "[]", "nonsense"):
        with pytest.raises(ValueError, match=r"adapter\.safetensors: resolution policy"):
            ResolutionPolicy.from_json(text, "adapter.safetensors")


def test_a_base_carries_its_own_policy(tmp_path):
    assert read_base_policy(tmp_path) == ResolutionPolicy()
    assert read_base_policy("owner/repo") == ResolutionPolicy()
    own = ResolutionPolicy(native_sequence_length=320)
    (tmp_path / "resolution_policy.json").write_text(own.to_json())
    assert read_base_policy(tmp_path) == own


@pytest.mark.slow
@torch.no_grad()
def test_no_recompilation_from_one_resolution_to_the_next(load_pipe, sample, expected):
    from urae import adapt

    adapters = [expected / f"dev_{name}.safetensors" for name in ("2k_lora", "4k_minor")]
    pipe = adapt(load_pipe(), adapters)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.transformer.compile_repeated_blocks(backend="eager", dynamic=True, fullgraph=True)
        sample(pipe, 64, 64, num_inference_steps=1)
        with torch.compiler.set_stance("fail_on_recompile"):
            sample(pipe, 96, 64, num_inference_steps=1)
            sample(pipe, 128, 160, num_inference_steps=1)
    torch._dynamo.reset()
