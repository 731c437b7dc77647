import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxImg2ImgPipeline
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import create_block_mask

import urae
from urae.adapters.files import read_adapter
from urae.backbones.flux import load_transformer
from urae.geometry import build_image_ids, build_text_ids
from urae.local_attention import build_local_attention, find_grid, reorder_inputs
from urae.resolution import ResolutionPolicy, apply_policy, find_policy, remove_policy
from urae.train import train
from urae.train.config import AdapterConfig, OptimizerConfig, TrainConfig

CPU = torch.device("cpu")
LOCAL = ResolutionPolicy(native_sequence_length=80, attention="local")  # 8 x 8 image tokens
FULL = ResolutionPolicy(native_sequence_length=80)
GRIDS = [(16, 16), (11, 9), (9, 30), (40, 3), (23, 17)]


@pytest.fixture(autouse=True)
def _random_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def transformer(bases):
    return load_transformer(bases["dev"], dtype=torch.float32).requires_grad_(False)


def draw_inputs(rows, columns, num_text=7, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, rows * columns, 64, generator=generator),
        "encoder_hidden_states": torch.randn(batch, num_text, 32, generator=generator),
        "pooled_projections": torch.randn(batch, 24, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.ones(batch),
        "img_ids": build_image_ids(rows, columns),
        "txt_ids": build_text_ids(num_text),
        "return_dict": False,
    }


def use_backend(transformer, name):
    with attention_backend(name):  # set_attention_backend would set the process's own for good
        transformer.set_attention_backend(name)


def sees_plainly(rows, columns, num_text, side):
    """Spell out from the words alone which tokens see which, text first, in the picture's order."""

    def cut(size, tile, window):
        count = -(-size // tile)
        tile_of = [token * count // size for token in range(size)]
        members = [[t for t in range(size) if tile_of[t] == each] for each in range(count)]
        centres = {tokens[len(tokens) // 2] for tokens in members}
        first = [max(0, min(each - window // 2, count - window)) for each in range(count)]
        return tile_of, centres, first, window

    row_tile, row_centres, row_first, down = cut(rows, side // 4, 5)
    column_tile, column_centres, column_first, across = cut(columns, side // 8, 9)
    tokens = [(row, column) for row in range(rows) for column in range(columns)]
    length = num_text + len(tokens)
    visible = torch.ones(length, length, dtype=torch.bool)
    for query, (row, column) in enumerate(tokens, num_text):
        top, left = row_first[row_tile[row]], column_first[column_tile[column]]
        for key, (other_row, other_column) in enumerate(tokens, num_text):
            near = (
                top <= row_tile[other_row] < top + down
                and left <= column_tile[other_column] < left + across
            )
            anchor = other_row in row_centres and other_column in column_centres
            visible[query, key] = near or anchor

    def place(number):
        row, column = tokens[number - num_text]
        along = column_tile[column] if row_tile[row] % 2 == 0 else -column_tile[column]
        anchor = row in row_centres and column in column_centres
        return not anchor, row_tile[row], along, number

    sequence = [*range(num_text), *sorted(range(num_text, length), key=place)]
    size = side * side // 32
    for first in range(0, length, size):
        queries = torch.tensor(sequence[first : first + size])
        for start in range(0, length, size):
            keys = torch.tensor(sequence[start : start + size])
            if visible[queries[:, None], keys].any():
                visible[queries[:, None], keys] = True
    return visible


def in_picture_order(pattern, num_text):
    mask = pattern.build_mask()[0, 0]
    back = torch.cat([torch.arange(num_text), num_text + pattern.inverse])
    return mask[back][:, back]


# --- the pattern ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_pattern_is_its_plain_definition(rows, columns, side):
    pattern = build_local_attention(rows, columns, 3, side, CPU)
    mask = in_picture_order(pattern, 3)
    assert mask[:3].all()
    assert mask[:, :3].all()
    plain = sees_plainly(rows, columns, 3, side)
    assert torch.equal(mask, plain)
    assert pattern.num_keys == pytest.approx(plain[3:].sum(1).float().mean().item())
    assert pattern.is_full == plain.all()


def test_sizes_are_those_of_flux():
    pattern = build_local_attention(256, 256, 512, 64, CPU)
    assert pattern.groups.bincount().tolist() == [128] * 516
    counts = pattern.sees.sum(1)
    assert (counts[:4] == 516).all()  # the text sees all
    # four blocks of text, four of anchors, 5 rows of 9 tiles that begin and end within blocks
    assert 8 + 5 * 9 < counts[8:].min() <= counts[8:].max() <= 8 + 5 * 12
    found = pattern.block_mask
    assert found.kv_num_blocks.sum() == 0  # nothing is masked inside of a block
    assert found.full_kv_num_blocks[0, 0].tolist() == counts.tolist()


@pytest.mark.parametrize("side", [8, 16, 64])
def test_a_window_is_never_smaller_than_the_native_side(side):
    for length in range(1, 4 * side):
        for pattern in (
            build_local_attention(length, 1, 0, side, CPU),
            build_local_attention(1, length, 0, side, CPU),
        ):
            assert pattern.num_keys >= min(length, side)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_order_round_trips_and_keeps_tiles_together(rows, columns):
    pattern = build_local_attention(rows, columns, 2, 16, CPU)
    tokens = torch.arange(rows * columns)
    assert torch.equal(pattern.order.sort().values, tokens)
    assert torch.equal(pattern.order[pattern.inverse], tokens)
    assert (pattern.groups.diff() >= 0).all()
    arguments = {
        "hidden_states": torch.randn(2, rows * columns, 4),
        "img_ids": build_image_ids(rows, columns),
        "controlnet_block_samples": None,
        "controlnet_single_block_samples": [torch.randn(2, rows * columns, 5)],
    }
    before = dict(arguments)
    reorder_inputs(arguments, pattern.order)
    reorder_inputs(arguments, pattern.inverse)
    for name in ("hidden_states", "img_ids"):
        assert torch.equal(arguments[name], before[name])
    name = "controlnet_single_block_samples"
    assert torch.equal(arguments[name][0], before[name][0])


@pytest.mark.parametrize(
    ("rows", "columns", "num_text", "side"),
    [(32, 40, 64, 16), (23, 57, 7, 16), (16, 24, 0, 8), (80, 112, 128, 64)],
)
def test_block_mask_is_the_same_pattern(rows, columns, num_text, side):
    pattern = build_local_attention(rows, columns, num_text, side, CPU)
    found, length = pattern.block_mask, len(pattern.groups)
    wanted = create_block_mask(found.mask_mod, None, None, length, length, device="cpu")
    assert found.shape == wanted.shape
    for counts, blocks in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        assert torch.equal(getattr(found, counts), getattr(wanted, counts))
        assert torch.equal(getattr(found, blocks), getattr(wanted, blocks))
    assert torch.equal(found.to_dense(), wanted.to_dense())
    query, key = torch.arange(length)[:, None], torch.arange(length)
    assert torch.equal(found.mask_mod(0, 0, query, key), pattern.build_mask()[0, 0])


def test_grids_are_found_in_position_ids():
    for rows, columns in [*GRIDS, (1, 5), (5, 1)]:
        ids = build_image_ids(rows, columns)
        assert find_grid(ids) == (rows, columns)
        assert find_grid(ids[None] + torch.tensor([1.0, 3, 2])) == (rows, columns)
    ids = build_image_ids(4, 6)
    for other in (
        torch.cat([ids, ids + torch.tensor([1.0, 0, 0])]),  # Kontext's reference picture
        ids.flip(0),
        ids[:-1],
        torch.rand(24, 3),
    ):
        with pytest.raises(ValueError, match="needs the tokens of one picture in row order"):
            find_grid(other)


# --- the transformer ------------------------------------------------------------------------------


def run_plainly(transformer, inputs, rows, columns, policy=LOCAL):
    """Compute local attention in the picture's own order, with a spelt-out mask."""
    num_text = inputs["txt_ids"].shape[0]
    mask = sees_plainly(rows, columns, num_text, policy.native_side)
    num_keys = mask[num_text:].sum(1).float().mean().item()
    scale = math.sqrt(policy.attention_scale(num_keys))
    positions = apply_policy(
        transformer, ResolutionPolicy(policy.ntk_factor, proportional_attention=False)
    )
    positions.register_forward_hook(lambda _, __, output: tuple(each * scale for each in output))
    kwargs = {"attention_mask": mask[None, None]}
    output = transformer(**inputs, joint_attention_kwargs=kwargs)[0]
    remove_policy(transformer)
    return output


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@torch.no_grad()
def test_forward_equals_the_plain_computation(transformer, rel, rows, columns):
    inputs = draw_inputs(rows, columns, batch=2)
    wanted = run_plainly(transformer, inputs, rows, columns)
    full = transformer(**inputs)[0]
    apply_policy(transformer, LOCAL)
    found = transformer(**inputs)[0]
    assert rel(found, wanted) < 1e-5
    assert rel(found, full) > 1e-3
    inputs["return_dict"] = True
    assert torch.equal(transformer(**inputs).sample, found)


@torch.no_grad()
def test_forward_through_a_block_mask(transformer, rel):
    """Eager FlexAttention on the CPU is slow and exact."""
    inputs = draw_inputs(17, 14, batch=2)
    apply_policy(transformer, LOCAL)
    wanted = transformer(**inputs)[0]
    use_backend(transformer, "flex")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        assert rel(transformer(**inputs)[0], wanted) < 1e-5


def gradients(transformer, inputs, run):
    hidden_states = inputs["hidden_states"].clone().requires_grad_()
    weight = transformer.single_transformer_blocks[0].attn.to_k.weight.requires_grad_()
    weight.grad = None
    output = run({**inputs, "hidden_states": hidden_states})
    output.square().mean().backward()
    return hidden_states.grad, weight.grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_equals_the_plain_computation(transformer, rel, checkpointing):
    inputs = draw_inputs(14, 23)
    wanted = gradients(transformer, inputs, lambda each: run_plainly(transformer, each, 14, 23))
    apply_policy(transformer, LOCAL)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    found = gradients(transformer, inputs, lambda each: transformer(**each)[0])
    for one, other in zip(found, wanted, strict=True):
        assert rel(one, other) < 1e-4


@torch.no_grad()
def test_a_window_over_everything_is_full_attention(transformer, rel):
    inputs = draw_inputs(9, 7)
    wanted = transformer(**inputs)[0]
    pattern = build_local_attention(9, 7, 7, 8, CPU)
    assert pattern.is_full
    reorder_inputs(inputs, pattern.order)
    kwargs = {"attention_mask": pattern.build_mask()}
    found = transformer(**inputs, joint_attention_kwargs=kwargs)[0]
    assert rel(found[:, pattern.inverse], wanted) < 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (4, 16), (5, 7), (10, 9)])
@torch.no_grad()
def test_nothing_happens_up_to_native_size_or_within_one_window(transformer, rows, columns):
    inputs = draw_inputs(rows, columns)
    apply_policy(transformer, FULL)
    wanted = transformer(**inputs)[0]
    apply_policy(transformer, LOCAL)
    transformer(**draw_inputs(16, 16))  # local, and back
    seen = []
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["joint_attention_kwargs"]), with_kwargs=True
        )
    assert torch.equal(transformer(**inputs)[0], wanted)
    assert seen == [None]
    assert {each._attention_backend for each in transformer.attn_processors.values()} == {None}


@torch.no_grad()
def test_controlnet_residuals_follow_the_order(transformer, rel):
    rows, columns = 13, 20
    inputs = draw_inputs(rows, columns)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        inputs[name] = [torch.randn(1, rows * columns, 64)]
    wanted = run_plainly(transformer, inputs, rows, columns)
    apply_policy(transformer, LOCAL)
    assert rel(transformer(**inputs)[0], wanted) < 1e-5


@torch.no_grad()
def test_ids_in_half_precision_and_the_callers_own_arguments(transformer, rel):
    inputs = draw_inputs(2, 300)
    apply_policy(transformer, LOCAL)
    wanted = transformer(**inputs)[0]
    inputs["img_ids"] = inputs["img_ids"].bfloat16()
    given = {"scale": 1.0}
    assert torch.equal(transformer(**inputs, joint_attention_kwargs=given)[0], wanted)
    assert given == {"scale": 1.0}


def test_what_excludes_it_is_refused(transformer):
    apply_policy(transformer, LOCAL)
    inputs = draw_inputs(16, 16)
    with pytest.raises(ValueError, match="sets its own attention_mask"):
        transformer(**inputs, joint_attention_kwargs={"attention_mask": None})
    with pytest.raises(ValueError, match="needs the tokens of one picture"):
        transformer(**{**inputs, "img_ids": torch.cat([build_image_ids(16, 8)] * 2)})
    processors = list(transformer.attn_processors.values())
    processors[0]._attention_backend = "_native_math"
    with pytest.raises(ValueError, match="flex for all blocks, not None, _native_math"):
        transformer(**inputs)
    processors[0]._attention_backend = None
    transformer._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(ValueError, match="cannot be combined with context parallelism"):
        transformer(**inputs)


@torch.no_grad()
def test_a_backend_of_the_users_stays(transformer, rel):
    inputs = draw_inputs(16, 16)
    apply_policy(transformer, LOCAL)
    wanted = transformer(**inputs)[0]
    use_backend(transformer, "_native_math")
    assert rel(transformer(**inputs)[0], wanted) < 1e-5
    remove_policy(transformer)
    for processor in transformer.attn_processors.values():
        assert processor._attention_backend == "_native_math"


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_take_a_block_mask_of_every_size(transformer, rel):
    apply_policy(transformer, LOCAL)
    *first, last = sizes = [(16, 16), (11, 30), (24, 13)]
    wanted = {size: transformer(**draw_inputs(*size))[0] for size in sizes}
    use_backend(transformer, "flex")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer.compile_repeated_blocks(backend="eager", dynamic=True, fullgraph=True)
        for size in first:
            assert rel(transformer(**draw_inputs(*size))[0], wanted[size]) < 1e-5
        with torch.compiler.set_stance("fail_on_recompile"):
            assert rel(transformer(**draw_inputs(*last))[0], wanted[last]) < 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_a_wholly_compiled_transformer(transformer, rel):
    apply_policy(transformer, LOCAL)
    inputs = draw_inputs(12, 14)
    wanted = transformer(**inputs)[0]
    compiled = torch.compile(transformer, backend="eager")
    assert rel(compiled(**inputs)[0], wanted) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_attention_is_compiled_where_blocks_are_not(transformer, rel, monkeypatch, checkpointing):
    """What happens on CUDA, traced: there FlexAttention must be compiled, or it holds all scores.

    Its backward on the CPU is refused by a check alone; as plain operations it is there.
    """
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager")
    )
    inputs = draw_inputs(14, 23)
    positions = apply_policy(transformer, LOCAL)
    transformer.train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    wanted = gradients(transformer, inputs, lambda each: transformer(**each)[0])
    use_backend(transformer, "flex")
    positions.local._compile_attention(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert all(block.attn._compiled_call_impl for block in blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(transformer, inputs, lambda each: transformer(**each)[0])
    for one, other in zip(found, wanted, strict=True):
        assert rel(one, other) < 1e-4
    remove_policy(transformer)
    assert not any(block.attn._compiled_call_impl for block in blocks)
    torch._dynamo.reset()


# --- pipelines ------------------------------------------------------------------------------------


def test_adapt_and_restore(load_pipe, expected, sample, rel):
    pipe = load_pipe()
    stock = sample(pipe)
    lora = expected / "dev_2k_lora.safetensors"
    full = sample(urae.adapt(pipe, lora, policy=FULL))
    local = sample(urae.adapt(pipe, lora, policy=LOCAL))
    assert local.isfinite().all()
    assert rel(local, full) > 1e-3
    # a copy lies elsewhere in memory, where kernels may sum in another order
    assert rel(sample(copy.deepcopy(pipe)), local) < 1e-5
    assert torch.equal(sample(urae.adapt(pipe, lora, policy=FULL)), full)
    urae.adapt(pipe, lora, policy=LOCAL)
    assert torch.equal(sample(urae.restore(pipe)), stock)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks


def test_several_images_a_prompt(load_pipe, expected, sample, rel):
    pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors", policy=LOCAL)
    latents = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(0))
    both = sample(pipe, latents=latents, num_images_per_prompt=2)
    for index in range(2):
        assert rel(both[index], sample(pipe, latents=latents[index : index + 1])[0]) < 1e-5


def test_image_to_image(load_pipe, expected, sample):
    pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors", policy=LOCAL)
    refine = FluxImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    picture = torch.rand(1, 3, 192, 256, generator=torch.Generator().manual_seed(0))
    options = {"image": picture, "strength": 0.5}
    local = sample(refine, 192, 256, **options)
    urae.adapt(pipe, expected / "dev_2k_lora.safetensors", policy=FULL)
    assert not torch.equal(sample(refine, 192, 256, **options), local)


def test_a_controlnet_keeps_full_attention(load_pipe):
    pipe = load_pipe()
    controlnet = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2,
    )  # fmt: skip
    for block in controlnet.controlnet_blocks:
        torch.nn.init.normal_(block.weight)
    pipe = FluxControlNetPipeline(**pipe.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    urae.adapt(pipe, policy=LOCAL)
    assert find_policy(pipe.controlnet).local is None
    inputs = draw_inputs(16, 16) | {"controlnet_cond": torch.randn(1, 256, 64)}
    found = controlnet(**inputs)[0][0]
    apply_policy(controlnet, FULL)
    assert torch.equal(controlnet(**inputs)[0][0], found)
    image = torch.zeros(1, 3, 256, 256)
    out = pipe("a", control_image=image, height=256, width=256, num_inference_steps=1,
               output_type="latent").images  # fmt: skip
    assert out.isfinite().all()


def test_a_run_trains_with_it_and_says_so(bases, expected, tmp_path):
    losses = {}
    for policy in (FULL, LOCAL):
        config = TrainConfig(
            model=str(bases["dev"]),
            data_dir=expected.parent / "train_data",
            output_dir=tmp_path / policy.attention,
            resolution=256,
            steps=1,
            adapter=AdapterConfig(rank=4),
            optimizer=OptimizerConfig(name="adamw", lr=1e-4),
            policy=policy,
        )
        adapter = read_adapter(train(config).adapter_path)
        assert adapter.policy == policy
        rows = (tmp_path / policy.attention / "loss.csv").read_text().splitlines()
        losses[policy.attention] = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert losses["full"]["loss"] != losses["local"]["loss"]


# --- the policy -----------------------------------------------------------------------------------


def test_native_side_is_that_of_flux_and_of_the_miniature():
    assert ResolutionPolicy().native_side == 64
    assert ResolutionPolicy(native_sequence_length=64 + 16**2).native_side == 16


def test_metadata_without_local_attention_is_as_it_was():
    assert set(json.loads(ResolutionPolicy().to_json())) == {
        "ntk_factor",
        "proportional_attention",
        "native_sequence_length",
        "time_shift",
    }
    assert ResolutionPolicy.from_json(ResolutionPolicy().to_json(), "file").attention == "full"
    assert json.loads(LOCAL.to_json())["attention"] == "local"
    assert ResolutionPolicy.from_json(LOCAL.to_json(), "file") == LOCAL
    with pytest.raises(ValueError, match="file: resolution policy: attention"):
        ResolutionPolicy.from_json('{"attention": "near"}', "file")


def test_policy_values_are_checked():
    with pytest.raises(ValueError, match="attention 'near' must be 'full' or 'local'"):
        ResolutionPolicy(attention="near")
    with pytest.raises(ValueError, match="native_sequence_length 50 is too short for local"):
        ResolutionPolicy(native_sequence_length=50, attention="local")


def test_adapter_metadata_brings_it(load_pipe, expected, tmp_path):
    weights = load_file(expected / "dev_2k_lora.safetensors")
    path = tmp_path / "mine.safetensors"
    save_file(weights, path, metadata={"urae.policy": LOCAL.to_json()})
    pipe = urae.adapt(load_pipe(), path)
    assert find_policy(pipe.transformer).policy == LOCAL
    assert find_policy(pipe.transformer).local is not None
