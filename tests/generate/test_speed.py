import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

import urae
from urae.generate import speed
from urae.generate.joined_adapters import join_adapters
from urae.generate.optimize import check_machine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_blocks_that_all_differ_are_all_compiled(load_pipe, monkeypatch):
    """LoRAs of another rank in each block are more variants than torch allows by itself."""
    num_blocks = torch._dynamo.config.recompile_limit + 3
    config = {**load_pipe().transformer.config, "num_layers": 1, "num_single_layers": num_blocks}
    transformer = FluxTransformer2DModel.from_config(config).requires_grad_(False)
    ranks = {rf"single_transformer_blocks.{n}.proj_mlp": n + 1 for n in range(num_blocks)}
    transformer.add_adapter(LoraConfig(target_modules=[*ranks], rank_pattern=ranks))
    join_adapters(transformer, merge=False)
    torch._dynamo.reset()
    counter, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_function(f, backend=counter))
    undo = speed.compile_blocks(transformer)
    before = torch._dynamo.config.recompile_limit
    for _ in range(2):
        run(transformer)
    assert counter.frame_count == 1 + num_blocks
    assert torch._dynamo.config.recompile_limit == before
    undo()


@torch.no_grad()
def run(transformer):
    config = transformer.config
    transformer(
        hidden_states=torch.randn(1, 16, config.in_channels),
        encoder_hidden_states=torch.randn(1, 8, config.joint_attention_dim),
        pooled_projections=torch.randn(1, config.pooled_projection_dim),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
        guidance=torch.tensor([3.5]),
    )


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(speed, "has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda _: None)


@pytest.mark.parametrize(("device", "lack"), [(GPU, "a C compiler"), (CPU, r"a C\+\+ compiler")])
def test_compiling_that_is_named_needs_a_compiler(without_compiler, device, lack):
    with pytest.raises(ValueError, match=f"compiled blocks need {lack}, which .* leave out"):
        check_machine(["compile"], device)
    check_machine(["constants"], device)


def test_a_pipe_is_not_touched_without_a_compiler(without_compiler, load_pipe, sample):
    pipe = load_pipe()
    wanted = sample(pipe, 64, 64)
    with pytest.raises(ValueError, match="compiled blocks need"):
        urae.optimize(pipe, speed=None, parts=["compile"])
    assert torch.equal(sample(pipe, 64, 64), wanted)


def test_a_preset_says_that_it_does_not_compile(without_compiler, monkeypatch, caplog):
    assert not speed.can_compile(CPU)
    assert not speed.pays_to_compile(GPU, 256, 256, 4, 1)
    assert not caplog.text  # which loses nothing
    assert not speed.pays_to_compile(GPU, 4096, 4096, 28, 1)
    assert "the blocks run uncompiled, which is slower; compiling needs a C compiler" in caplog.text
    monkeypatch.setattr(speed, "has_triton", lambda: False)
    assert not speed.can_compile(GPU)
    assert "compiling needs Triton and a GPU of compute capability 7.0" in caplog.text


def test_a_compiler_may_be_named_in_the_environment(without_compiler, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/opt/icx" if name == "icx" else None)
    monkeypatch.setenv("CC", "icx")
    monkeypatch.setenv("CXX", "icx")
    speed.check_compiler(GPU)
    speed.check_compiler(CPU)
