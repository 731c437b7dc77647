import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from urae.adapters import files, sources
from urae.adapters.attach import read_factors
from urae.adapters.files import LowRank, read_adapter, write_lora
from urae.adapters.sources import resolve_adapter
from urae.hub import HTTP_ERROR
from urae.storage import write_tensors

NAME = "transformer_blocks.0.attn.to_q"


def lora(rank=3, *, prefix=f"transformer.{NAME}", width=8, **extra):
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, width),
        f"{prefix}.lora_B.weight": torch.randn(width, rank),
    }
    return tensors | extra


def product(pair: LowRank) -> torch.Tensor:
    return pair.up @ pair.down


def test_write_then_read_is_bitwise(tmp_path):
    pair = LowRank(torch.randn(3, 8), torch.randn(8, 3))
    write_lora(tmp_path / "a.safetensors", {NAME: pair}, {"note": "x"})
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.kind == "lora"
    assert torch.equal(adapter.layers[NAME].down, pair.down)
    assert torch.equal(adapter.layers[NAME].up, pair.up)
    assert adapter.metadata["note"] == "x"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_reference_checkpoints(tmp_path, expected, prefix):
    """A folder, keys with and without the prefix of multi-GPU runs."""
    for source, name, kind in (
        ("dev_2k_lora", "pytorch_lora_weights", "lora"),
        ("dev_4k_minor", "adapter_weights", "minor"),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        tensors = load_file(expected / f"{source}.safetensors")
        save_file({prefix + k: t for k, t in tensors.items()}, folder / f"{name}.safetensors")
        adapter = read_adapter(folder)
        assert adapter.kind == kind
        assert len(adapter.layers) == 10
        assert "transformer_blocks.0.attn.to_out.0" in adapter.layers


def test_alpha_scales(tmp_path):
    tensors = lora()
    plain = product(LowRank(*tensors.values()))
    path = tmp_path / "a.safetensors"
    save_file(tensors | {f"transformer.{NAME}.alpha": torch.tensor(6.0)}, path)
    assert torch.allclose(product(read_adapter(path).layers[NAME]), 2 * plain)
    config = {"transformer.lora_alpha": 12, "transformer.r": 3}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    assert torch.allclose(product(read_adapter(path).layers[NAME]), 4 * plain)


@pytest.mark.parametrize("stem", [f"transformer.{NAME}", "lora_unet_single_blocks_0_linear1"])
def test_a_small_scale_loses_nothing_in_half_precision(tmp_path, stem, rel):
    sides = ("lora_down", "lora_up") if "unet" in stem else ("lora_A", "lora_B")
    down, up = torch.randn(2, 8).half(), (1e-5 * torch.randn(56, 2)).half()
    tensors = {f"{stem}.{side}.weight": t for side, t in zip(sides, (down, up), strict=True)}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(2 / 64)}, tmp_path / "a.safetensors")
    layers = read_adapter(tmp_path / "a.safetensors").layers
    found = torch.cat([pair.up.float() @ pair.down.float() for pair in layers.values()])
    assert rel(found, up.float() @ down.float() / 64) < 1e-6


def test_pefts_own_files(tmp_path, caplog):
    tensors = lora()
    plain = product(LowRank(*tensors.values()))
    keys = {key.replace("transformer.", "base_model.model.", 1): t for key, t in tensors.items()}
    save_file(keys, tmp_path / "adapter_model.safetensors")
    assert torch.equal(product(read_adapter(tmp_path).layers[NAME]), plain)
    assert "so its alpha is unknown and taken to be its rank" in caplog.text
    caplog.clear()
    settings = {"lora_alpha": 3, "alpha_pattern": {"to_q": 6}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert torch.allclose(product(read_adapter(tmp_path).layers[NAME]), 2 * plain)
    assert not caplog.text
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(ValueError, match="its LoRA settings are damaged"):
        read_adapter(tmp_path)


def test_keys_that_diffusers_chokes_on(tmp_path):
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors is not a LoRA that diffusers can read"):
        read_adapter(tmp_path / "a.safetensors")


def kohya_names(tensors):
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    return {f"{stem}.{sides[key.split('.')[-2]]}.weight": t for key, t in tensors.items()}


DORA_SCALE = {"lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(64, 1)}
T5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
PART = "is of a part that cannot be read"
LOKR = "lora_unet_double_blocks_0_img_attn_proj.lokr_w1"
NO_LAYER = "its keys have an unknown layout"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (kohya_names(lora()) | DORA_SCALE, r"a\.safetensors is a DoRA with kohya's keys"),
        (kohya_names(lora()) | {f"{T5}.lora_up.weight": torch.ones(8, 3)}, PART),
        (kohya_names(lora()) | {f"{LOKR[:-7]}diff_b": torch.ones(8)}, PART),
        (kohya_names(lora()) | {"lora_unet_norm.diff": torch.ones(8)}, PART),
        (kohya_names(lora()) | {"unknown.weight": torch.ones(8)}, PART),
        ({LOKR: torch.ones(2, 2)}, r"is a LyCORIS LoKr, LoHa or OFT"),
        ({f"{LOKR[:-7]}hada_w1_a": torch.ones(2, 2)}, r"is a LyCORIS LoKr, LoHa or OFT"),
        ({f"transformer.{NAME}.lokr_w1": torch.ones(2, 2), f"transformer.{NAME}.alpha":
            torch.ones(())}, r"is a LyCORIS LoKr, LoHa or OFT"),
        (lora(prefix="diffusion_model.double_blocks.0.img_attn.qkv"), NO_LAYER),
        (lora(prefix="transformer.transformer_blocks.0"), NO_LAYER),
        ({"lora_transformer_transformer_blocks_0_ff_net_0_proj.lora_down.weight": torch.ones(3, 8),
          "lora_transformer_transformer_blocks_0_ff_net_0_proj.lora_up.weight": torch.ones(8, 3),
          "lora_transformer_transformer_blocks_0_ff_net_0_proj.alpha": torch.ones(())}, NO_LAYER),
        ({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(3, 8)},
         r"diffusers can read \(ValueError: Incompatible keys detected\); it is damaged, or its "),
    ],
)  # fmt: skip
def test_layouts_that_are_not_read(tmp_path, load_pipe, tensors, message):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        read_adapter(path)
    with pytest.raises(ValueError, match=message):
        files.check_lora(path, load_pipe().transformer)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"transformer.{NAME}.lokr_w1": torch.ones(2, 2)},
         "is a lokr adapter, which cannot be combined"),
        ({f"base_model.model.{NAME}.lora_magnitude_vector": torch.ones(2)}, "is a dora adapter"),
        ({"note": torch.ones(2)}, NO_LAYER),
        ({}, "holds no adapter weights"),
        ({f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{side}.weight":
            torch.ones(2, 2) for side in ("down", "up")}, "its factors for the text encoder, such"),
    ],
)  # fmt: skip
def test_loras_that_diffusers_would_not_attach(tmp_path, load_pipe, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        files.check_lora(tmp_path / "a.safetensors", load_pipe().transformer)


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("case", ["peft", "bare", "module", "kohya float8", "stock"])
def test_loras_are_read_alike_beside_adapters(tmp_path, load_pipe, case, rel):
    """As `--lora`: what stock diffusers does not read by itself gets its names."""
    tensors = lora(width=64)
    change = {
        "peft": lambda key: key.replace("transformer.", "base_model.model.", 1),
        "bare": lambda key: key.removeprefix("transformer."),
        "module": lambda key: f"module.{key}",
    }.get(case, lambda key: key)
    tensors = {change(key): tensor for key, tensor in tensors.items()}
    if case == "kohya float8":
        tensors = {key: tensor.to(FLOAT8) for key, tensor in kohya_names(tensors).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if case == "peft":
        (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 6}')
    pipe = load_pipe()
    files.check_lora(tmp_path, pipe.transformer)
    found = files.read_lora(tmp_path)
    assert isinstance(found, Path) == (case == "stock")
    pipe.load_lora_weights(found, adapter_name="style")
    wanted = read_adapter(tmp_path).layers
    attached = read_factors(pipe.transformer, "style")
    assert attached.keys() == wanted.keys()
    for name, pair in wanted.items():
        assert rel(product(attached[name]), product(pair)) < 1e-6


def test_float8_is_read_in_float32(tmp_path):
    tensors = {key: tensor.to(FLOAT8) for key, tensor in lora().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    pair = read_adapter(tmp_path / "a.safetensors").layers[NAME]
    assert torch.equal(product(pair), product(LowRank(*(t.float() for t in tensors.values()))))


@pytest.mark.parametrize("own", [{}, {"urae.format": "1"}])
@pytest.mark.parametrize("prefix", [f"transformer.{NAME}", NAME, None])
def test_pefts_settings_are_not_of_other_files_beside(tmp_path, own, prefix):
    tensors = lora() if prefix is None else lora(prefix=prefix)
    plain = product(LowRank(*tensors.values()))
    save_file(kohya_names(tensors) if prefix is None else tensors, tmp_path / "a.safetensors", own)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12}')
    (pair,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert torch.allclose(product(pair), plain)


def test_kohya_keys(tmp_path):
    down, up = torch.randn(3, 8), torch.randn(8, 3)
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(1.5)}, tmp_path / "k.safetensors")
    layers = read_adapter(tmp_path / "k.safetensors").layers
    assert torch.allclose(product(layers["transformer_blocks.0.attn.to_out.0"]), up @ down / 2)


@pytest.mark.parametrize("kohya", ["linear", "adaLN_modulation_1"])
@pytest.mark.parametrize("prefix", ["lora_unet_final_layer_", "diffusion_model.final_layer."])
def test_the_final_layers_alpha_counts(tmp_path, kohya, prefix, rel):
    down, up = torch.randn(3, 8), torch.randn(8, 3)
    stem = prefix + (kohya.replace("_1", ".1") if prefix.endswith(".") else kohya)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(1.5)}, tmp_path / "k.safetensors")
    (pair,) = read_adapter(tmp_path / "k.safetensors").layers.values()
    wanted = up @ down / 2
    wanted = wanted if kohya == "linear" else torch.cat(wanted.chunk(2)[::-1])
    assert rel(product(pair), wanted) < 1e-6
    state = files.read_lora(tmp_path / "k.safetensors")
    assert all(key.startswith("transformer.") for key in state), "stock diffusers drops the others"
    assert rel(product(LowRank(*state.values())), wanted) < 1e-6


def test_parts_without_effect_are_left_out(tmp_path):
    tensors = {f"{T5}.lora_down.weight": torch.ones(3, 8), f"{T5}.alpha": torch.tensor(4.0)}
    tensors[f"{T5}.lora_up.weight"] = torch.zeros(8, 3)
    tensors[f"{LOKR[:-7]}diff_b"] = torch.zeros(8)
    save_file(kohya_names(lora()) | tensors, tmp_path / "k.safetensors")
    assert len(read_adapter(tmp_path / "k.safetensors").layers) == 1


def damage(path, kind):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if kind == "truncated" else b"garbage" + data[7:])


@pytest.mark.parametrize("kind", ["truncated", "garbage"])
def test_damaged_file(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    save_file(lora(), path)
    damage(path, kind)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a complete safetensors file"):
        read_adapter(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_file(tmp_path, value):
    tensors = lora()
    tensors[f"transformer.{NAME}.lora_B.weight"][2, 1] = value
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"{NAME}.lora_B.weight holds NaN or infinity"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_are_refused(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a pickle .* only \.safetensors"):
        read_adapter(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no adapter weights"),
        ({f"transformer.{NAME}.lora_A.weight": torch.ones(2, 8)}, "only one of its two factors"),
        (lora(0), "share a rank of 1 or more"),
        ({k: t.to(torch.int8) for k, t in lora().items()}, "is of type torch.int8, not floating"),
        (lora(3, **{f"transformer.{NAME}.lora_A.weight": torch.ones(2, 8)}), "share a rank"),
        (lora(3, **{"text_encoder.x.lora_A.weight": torch.ones(2, 8)}), "load_lora_weights"),
        (lora(3, **{f"transformer.{NAME}.bias": torch.ones(2)}), "not a low-rank factor"),
    ],
)
def test_files_that_are_no_adapter(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "a.safetensors")


def test_minor_metadata_must_fit(tmp_path):
    write_tensors(tmp_path / "a.safetensors", lora(3), {"urae.kind": "minor", "urae.rank": "3"})
    with pytest.raises(ValueError, match="has 3 components, but a minor adapter of rank 3 has 6"):
        read_adapter(tmp_path / "a.safetensors")


def test_raw_minor_components_have_one_rank(tmp_path):
    tensors = {}
    for layer, rank in (("to_q", 2), ("to_k", 3)):
        stem = f"transformer_blocks.0.attn.processor.{layer}"
        tensors |= {
            f"{stem}_a.weight": torch.ones(rank, 8),
            f"{stem}_b.weight": torch.ones(8, rank),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"attn\.to_[qk] is of rank \d, but .* is of rank \d; all"):
        read_adapter(tmp_path / "a.safetensors")


def test_where_adapters_are_found(tmp_path, monkeypatch):
    asked = []

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        if file.endswith(".json"):
            raise LocalEntryNotFoundError("no such file")
        return str(tmp_path / "hub.safetensors")

    monkeypatch.setattr(sources, "hf_hub_download", download)
    resolve_adapter("owner/repo/file.safetensors")
    resolve_adapter("hf://owner/repo@v1.0/sub/file.safetensors")
    assert asked == [
        ("owner/repo", "file.safetensors", None),
        ("owner/repo", "adapter_config.json", None),
        ("owner/repo", "sub/file.safetensors", "v1.0"),
        ("owner/repo", "sub/adapter_config.json", "v1.0"),
    ]
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "owner" / "repo" / "file.safetensors"
    local.parent.mkdir(parents=True)
    save_file(lora(), local)
    assert resolve_adapter("owner/repo/file.safetensors").resolve() == local
    assert len(asked) == 4
    save_file(lora(), local.with_name("other.safetensors"))
    with pytest.raises(ValueError, match=r"single \.safetensors file; found: file.safetens"):
        resolve_adapter(local.parent)


def test_pefts_settings_come_from_the_hub_too(tmp_path, monkeypatch):
    tensors = lora()
    plain = product(LowRank(*tensors.values()))
    keys = {key.replace("transformer.", "base_model.model.", 1): t for key, t in tensors.items()}

    def download(_, file, revision=None):
        path = tmp_path / file
        if path.suffix == ".json":
            path.write_text('{"lora_alpha": 6}')
        else:
            save_file(keys, path)
        return str(path)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    adapter = read_adapter("owner/repo/a.safetensors")
    assert torch.allclose(product(adapter.layers[NAME]), 2 * plain)


@pytest.mark.parametrize("source", ["missing.safetensors", "owner/repo", "./a/b/c", "/a/b/c"])
def test_missing_adapter(source):
    with pytest.raises(FileNotFoundError, match=r"neither an existing file .*owner/repo"):
        resolve_adapter(source)


def test_sources_that_name_nothing(tmp_path, monkeypatch):
    save_file(lora(), tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the name of an adapter is empty; give a file"):
        resolve_adapter("")
    with pytest.raises(FileNotFoundError, match=r"~no_such_user/x was not found, .* home folder"):
        resolve_adapter("~no_such_user/x")


def test_hub_adapter_that_cannot_be_had(monkeypatch):
    def fail(*_, **__):
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RepositoryNotFoundError("404: no such repository", response=response)

    monkeypatch.setattr(sources, "hf_hub_download", fail)
    with pytest.raises(
        FileNotFoundError, match=r"owner/repo/a\.safetensors .* \(404: no such repository"
    ):
        resolve_adapter("owner/repo/a.safetensors")


def test_a_connection_that_breaks_off_is_told(monkeypatch):
    def fail(*_, **__):
        raise HTTP_ERROR("server disconnected")

    monkeypatch.setattr(sources, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=r"\(server disconnected\); check the name"):
        resolve_adapter("owner/repo/a.safetensors")


def test_tensors_that_share_memory_are_written(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"x": whole, "y": whole, "z": whole[:1]})
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["x"], whole)
    assert torch.equal(found["y"], whole)
    assert torch.equal(found["z"], whole[:1])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(3)})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(path, {"x": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == [path]
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.ones(3))
