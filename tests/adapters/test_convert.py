import shutil

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

import urae
from urae.adapters.convert import ConvertConfig, convert, to_kohya
from urae.adapters.files import LowRank, read_adapter, write_lora
from urae.adapters.initial import check_order


@pytest.fixture
def sources(expected, base):
    return tuple(str(expected / f"{base}_{name}.safetensors") for name in ("2k_lora", "4k_minor"))


def test_conversion_equals_the_reference(base, bases, sources, expected, tmp_path, rel):
    path = convert(ConvertConfig(sources, tmp_path / "c.safetensors", model=str(bases[base])))
    ours = read_adapter(path).layers
    theirs = read_adapter(expected / f"{base}_4k_lora_conversion.safetensors").layers
    assert ours.keys() == theirs.keys()
    for name, pair in ours.items():
        assert pair.down.shape == theirs[name].down.shape
        assert rel(pair.up @ pair.down, theirs[name].up @ theirs[name].down) < 1e-5


def test_conversion_does_the_same_in_stock_diffusers(
    base, bases, sources, load_pipe, sample, tmp_path, rel
):
    path = convert(ConvertConfig(sources, tmp_path / "c.safetensors", model=str(bases[base])))
    wanted = sample(urae.adapt(load_pipe(base), sources))
    pipe = urae.adapt(load_pipe(base))
    pipe.load_lora_weights(path)
    assert rel(sample(pipe), wanted) < 1e-5


def test_of_the_base_the_transformer_is_enough(base, sources, bases, tmp_path):
    whole, part = bases[base], tmp_path / "base"
    shutil.copytree(whole / "transformer", part / "transformer")
    shutil.copy(whole / "model_index.json", part)
    files = [
        convert(ConvertConfig(sources, tmp_path / f"{model.name}.safetensors", model=str(model)))
        for model in (whole, part)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_raw_minor_adapter_needs_its_base(sources, tmp_path, base):
    with pytest.raises(ValueError, match="does not hold its B0 and A0"):
        convert(ConvertConfig(sources, tmp_path / "c.safetensors"))
    assert not list(tmp_path.iterdir())


def test_a_minor_adapter_of_ours_without_what_it_was_trained_over(tmp_path, expected):
    initial = torch.ones(64, 1)
    layers = {
        "transformer_blocks.0.attn.to_q": LowRank(initial.T.repeat(2, 1), initial.repeat(1, 2))
    }
    metadata = {"urae.kind": "minor", "urae.rank": "1", "urae.over": "runs/my_2k"}
    write_lora(tmp_path / "m.safetensors", layers, metadata)
    with pytest.raises(ValueError, match=r"was trained over runs/my_2k; give both"):
        convert(ConvertConfig((str(tmp_path / "m.safetensors"),), tmp_path / "c.safetensors"))


@pytest.mark.parametrize("kind", ["lora", "minor"])
def test_any_adapter_needs_what_it_was_trained_over(tmp_path, expected, caplog, kind):
    """Both directly after it; a LoRA, which is a sum, after others too."""
    lora, own = expected / "dev_2k_lora.safetensors", tmp_path / "own.safetensors"
    other = tmp_path / "other.safetensors"
    save_file({key: tensor / 2 for key, tensor in load_file(lora).items()}, other)
    layers = {"transformer_blocks.0.attn.to_q": LowRank(torch.ones(2, 64), torch.ones(64, 2))}
    metadata = {"urae.kind": kind, "urae.rank": "1", "urae.over": str(lora)}
    write_lora(own, layers, metadata)
    with pytest.raises(ValueError, match=f"^{kind} adapter .* was trained over {lora}; give both"):
        check_order([read_adapter(own)])
    check_order([read_adapter(lora), read_adapter(own)])
    assert not caplog.text
    check_order([read_adapter(lora), read_adapter(other), read_adapter(own)])
    assert bool(caplog.text) == (kind == "minor")
    check_order([read_adapter(other), read_adapter(own)])
    assert f"{kind} adapter {own} was trained over {lora} but is placed after" in caplog.text


def test_a_folder_named_like_what_an_adapter_was_trained_over(tmp_path, expected, monkeypatch):
    (tmp_path / "my_2k").mkdir()
    monkeypatch.chdir(tmp_path)
    layers = {"transformer_blocks.0.attn.to_q": LowRank(torch.ones(2, 64), torch.ones(64, 2))}
    write_lora(tmp_path / "own.safetensors", layers, {"urae.over": "my_2k"})
    check_order(
        [read_adapter(expected / "dev_2k_lora.safetensors"), read_adapter("own.safetensors")]
    )


def test_output_is_kept(tmp_path, expected):
    source = (str(expected / "dev_2k_lora.safetensors"),)
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"exists and is kept"):
        convert(ConvertConfig(source, path))
    assert path.read_bytes() == b"mine"
    convert(ConvertConfig(source, path, overwrite=True))
    assert read_adapter(path).kind == "lora"
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        convert(ConvertConfig(source, tmp_path / "folder.safetensors"))
    with pytest.raises(ValueError, match="must end in"):
        convert(ConvertConfig(source, tmp_path / "c.bin"))


def test_another_base_is_refused(tmp_path, bases, expected):
    tensors = {k: t[:, :8].clone() if "_A" in k else t
               for k, t in load_file(expected / "dev_2k_lora.safetensors").items()}  # fmt: skip
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="for another base"):
        convert(
            ConvertConfig(
                (str(tmp_path / "other.safetensors"),),
                tmp_path / "c.safetensors",
                model=str(bases["dev"]),
            )
        )


def flux_layers(*names, rank=4, width=3072):
    """Random factors of FLUX.1's width: stock diffusers reads kohya keys at that width only."""
    shapes = {"proj_mlp": (4 * width, width), "ff.net.0.proj": (4 * width, width)}
    layers = {}
    for index, name in enumerate(names):
        tall, wide = next((s for k, s in shapes.items() if name.endswith(k)), (width, width))
        generator = torch.Generator().manual_seed(index)
        layers[name] = LowRank(
            torch.randn(rank, wide, generator=generator),
            torch.randn(tall, rank, generator=generator),
        )
    return layers


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("transformer_blocks", QKV),
        ("transformer_blocks", (*QKV, "attn.to_out.0", "ff.net.0.proj")),
        pytest.param("transformer_blocks", ("attn.to_k",), marks=pytest.mark.slow),
        ("transformer_blocks", ("attn.add_q_proj", "attn.to_add_out")),
        pytest.param("single_transformer_blocks", QKV, marks=pytest.mark.slow),
        ("single_transformer_blocks", (*QKV, "proj_mlp")),
        ("single_transformer_blocks", ("attn.to_k",)),
    ],
)
def test_kohya_keys_do_the_same(kind, names, rel):
    layers = flux_layers(*[f"{kind}.3.{name}" for name in names])
    tensors = to_kohya(layers)
    assert all(key.startswith("lora_unet_") for key in tensors)
    back = FluxPipeline.lora_state_dict(dict(tensors))
    for name, pair in layers.items():
        down = back[f"transformer.{name}.lora_A.weight"]
        up = back[f"transformer.{name}.lora_B.weight"]
        assert rel(up @ down, pair.up @ pair.down) < 1e-6
    written = {key.removeprefix("transformer.").split(".lora_")[0] for key in back}
    for name in written - layers.keys():
        product = back[f"transformer.{name}.lora_B.weight"] @ back[
            f"transformer.{name}.lora_A.weight"
        ]  # fmt: skip
        assert not product.any()


def test_kohya_file_from_the_published_kind(expected, tmp_path):
    source = (str(expected / "dev_2k_lora.safetensors"),)
    path = convert(ConvertConfig(source, tmp_path / "k.safetensors", format="kohya"))
    keys = load_file(path).keys()
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in keys
    assert "lora_unet_single_blocks_1_linear1.alpha" in keys


def test_kohya_files_in_float32_convert(tmp_path, rel):
    """A factor that q, k and v share there is written once for each."""
    up, down = torch.randn(3 * 32, 4), torch.randn(4, 32)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    source = tmp_path / "k.safetensors"
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, source)
    path = convert(ConvertConfig((str(source),), tmp_path / "c.safetensors"))
    layers = read_adapter(path).layers
    pairs = [layers[f"transformer_blocks.0.{name}"] for name in QKV]
    assert rel(torch.cat([pair.up @ pair.down for pair in pairs]), up @ down) < 1e-6


def test_a_converted_file_in_the_folder_of_peft_is_not_scaled_twice(tmp_path, rel):
    source = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.transformer_blocks.0.attn.to_q"
    tensors = {f"{key}.lora_A.weight": torch.randn(4, 32), f"{key}.lora_B.weight": torch.eye(32, 4)}
    save_file(tensors, source)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    path = convert(ConvertConfig((str(source),), tmp_path / "c.safetensors"))
    for found in (source, path):
        (pair,) = read_adapter(found).layers.values()
        assert rel(pair.down, tensors[f"{key}.lora_A.weight"]) < 1e-6
        assert torch.equal(pair.up, 2 * tensors[f"{key}.lora_B.weight"])


def test_a_kohya_file_of_another_width_does_the_same(
    base, sources, load_pipe, sample, tmp_path, rel
):
    path = convert(ConvertConfig(sources[:1], tmp_path / "k.safetensors", format="kohya"))
    wanted = sample(urae.adapt(load_pipe(base), sources[0]))
    assert rel(sample(urae.adapt(load_pipe(base))), wanted) > 1e-3
    assert rel(sample(urae.adapt(load_pipe(base), path)), wanted) < 1e-5


@pytest.mark.parametrize(
    "parts", [("attn.to_k",), ("proj_mlp",), ("attn.to_q", "proj_mlp"), (*QKV, "proj_mlp")]
)
def test_parts_of_a_single_block_at_another_width(parts, tmp_path, rel):
    layers = flux_layers(*[f"single_transformer_blocks.3.{part}" for part in parts], width=32)
    tensors = to_kohya(layers)
    alpha = "lora_unet_single_blocks_3_linear1.alpha"
    save_file({**tensors, alpha: tensors[alpha] / 2}, tmp_path / "k.safetensors")
    back = read_adapter(tmp_path / "k.safetensors").layers
    assert back.keys() == layers.keys()
    for name, pair in layers.items():
        assert back[name].down.shape == pair.down.shape
        assert rel(2 * back[name].up @ back[name].down, pair.up @ pair.down) < 1e-6


def test_a_joined_matrix_of_another_width_that_was_trained_as_one(tmp_path, rel):
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((7 * 32, 4), (4, 32)))
    key = "lora_unet_single_blocks_0_linear1"
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    save_file(tensors, tmp_path / "k.safetensors")
    layers = read_adapter(tmp_path / "k.safetensors").layers.values()
    assert rel(torch.cat([pair.up @ pair.down for pair in layers]), up @ down) < 1e-6


@pytest.mark.parametrize("damage", [{"lora_down": (3, 32)}, {"lora_up": (7 * 32 + 1, 4)}])
def test_damaged_joined_matrices_are_refused(damage, tmp_path):
    key = "lora_unet_single_blocks_0_linear1"
    shapes = {"lora_up": (7 * 32, 4), "lora_down": (4, 32)} | damage
    tensors = {f"{key}.{side}.weight": torch.ones(shape) for side, shape in shapes.items()}
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(ValueError, match="is not a LoRA that diffusers can read"):
        read_adapter(tmp_path / "k.safetensors")


def test_a_layer_without_kohya_name():
    layers = {"x_embedder": LowRank(torch.ones(1, 2), torch.ones(2, 1))}
    with pytest.raises(ValueError, match="x_embedder has no name in kohya"):
        to_kohya(layers)


def test_a_minor_adapter_after_another_than_its_own_is_told(tmp_path, expected, caplog):
    lora, other = expected / "dev_2k_lora.safetensors", tmp_path / "other.safetensors"
    halved = {k: v / 2 if "_B" in k else v for k, v in load_file(lora).items()}
    save_file(halved, other)
    initial, layer = torch.ones(64, 1), "transformer_blocks.0.attn.to_q"
    layers = {layer: LowRank(initial.T.repeat(2, 1), initial.repeat(1, 2))}
    metadata = {"urae.kind": "minor", "urae.rank": "1", "urae.over": str(lora)}
    minor = tmp_path / "m.safetensors"
    write_lora(minor, layers, metadata)

    def convert_after(*before):
        caplog.clear()
        sources = (*map(str, before), str(minor))
        convert(ConvertConfig(sources, tmp_path / "c.safetensors", overwrite=True))
        return caplog.text

    assert convert_after(lora) == ""
    assert f"is placed after {other}" in convert_after(other)
    assert "2 adapters come before minor adapter" in convert_after(other, lora)


def test_what_cannot_be_written_is_said_before_anything_is_solved(expected, tmp_path, monkeypatch):
    monkeypatch.setattr("urae.adapters.convert.compute_updates", None)
    (tmp_path / "file").touch()
    source = str(expected / "dev_2k_lora.safetensors")
    with pytest.raises(FileExistsError, match="file is a file"):
        convert(ConvertConfig((source,), tmp_path / "file" / "x.safetensors"))
    odd = tmp_path / "odd.safetensors"
    write_lora(odd, {"x_embedder": LowRank(torch.randn(2, 64), torch.randn(64, 2))})
    with pytest.raises(ValueError, match="x_embedder has no name in kohya's format"):
        convert(ConvertConfig((str(odd),), tmp_path / "x.safetensors", format="kohya"))
