import json
import re
import shutil
from json import JSONDecodeError
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import save_file

import urae
from urae.backbones import flux, weights
from urae.backbones.flux import (
    build_meta_models,
    build_meta_transformer,
    encode_prompts,
    fetch_model,
    fingerprint_component,
    load_pipeline,
    load_transformer,
    predict_velocity,
    read_latent_scale,
)
from urae.backbones.weights import (
    find_attention_linears,
    linear_shape,
    open_original_weights,
    open_weight_files,
)
from urae.hub import HTTP_ERROR


def hub_error(kind):
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind("403 on the hub", response=response)


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("flux-dev", "black-forest-labs/FLUX.1-dev"),
        ("flux-schnell", "black-forest-labs/FLUX.1-schnell"),
        ("flux-krea", "black-forest-labs/FLUX.1-Krea-dev"),
        ("someone/flux", "someone/flux"),
    ],
)
def test_names_on_the_hub(monkeypatch, tmp_path, name, hub_id):
    asked = []

    def download(repo, **options):
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert fetch_model(name, without=["vae"]) == tmp_path
    assert asked == [(hub_id, {"vae": None})]


def test_a_gated_model_behind_diffusers_own_error(monkeypatch):
    def download(*_, **__):
        try:
            raise hub_error(GatedRepoError)
        except GatedRepoError:
            raise OSError("is not a valid model identifier")  # noqa: B904  as diffusers does

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(PermissionError, match="is gated"):
        fetch_model("flux-dev")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (hub_error(GatedRepoError), PermissionError, "is gated: accept its licence .*hf auth log"),
        (hub_error(RepositoryNotFoundError), FileNotFoundError, "could not be fetched .*log in"),
        (OSError("no connection"), FileNotFoundError, r"\(no connection\); check the name"),
        (HTTP_ERROR("closed by the server"), FileNotFoundError, r"\(closed by the server\); check"),
        (JSONDecodeError("no JSON", "<html>", 0), FileNotFoundError, r"\(no JSON: line 1 column 1"),
        (OSError(), FileNotFoundError, r"\(OSError\); check the name"),
    ],
)
def test_a_hub_that_says_no(monkeypatch, error, kind, message):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(kind, match=message):
        fetch_model("flux-dev")


def test_components_can_be_left_out(bases):
    pipe = load_pipeline(str(bases["dev"]), dtype=torch.bfloat16, without=["transformer", "vae"])
    assert type(pipe) is FluxPipeline
    assert pipe.transformer is None
    assert pipe.vae is None
    assert pipe.text_encoder_2.dtype == torch.bfloat16


def test_meta_transformer_has_the_shapes(bases):
    meta = build_meta_transformer(bases["dev"])
    loaded = load_transformer(bases["dev"], dtype=torch.float32)
    names = find_attention_linears(meta)
    assert names == find_attention_linears(loaded)
    assert len(names) == 1 * 4 + 2 * 3
    assert [linear_shape(meta, n) for n in names] == [linear_shape(loaded, n) for n in names]
    assert linear_shape(meta, "no.such.layer") is None
    assert linear_shape(meta, "norm_out") is None


def test_flux_has_190_matrices(tmp_path):
    with torch.device("meta"):
        assert len(find_attention_linears(FluxTransformer2DModel())) == 190


def save_single_file(path, *, guided=True, blocks=(19, 38), entry=(3072, 64)):
    """Write a file whose header has FLUX.1's blocks and entry, unless told otherwise."""
    names = [f"{kind}_blocks.{index}.norm.weight"
             for kind, count in zip(("double", "single"), blocks, strict=True)
             for index in range(count)]  # fmt: skip
    names += ["guidance_in.in_layer.weight"] if guided else []
    tensors = {name: torch.ones(1) for name in names}
    save_file({**tensors, "img_in.weight": torch.ones(entry)}, path)
    return path


@pytest.mark.parametrize("guided", [True, False])
def test_a_single_file_is_a_transformer_over_the_hub(monkeypatch, bases, tmp_path, guided):
    """The file's own shape is FLUX.1's, too large for a test: what is asked of diffusers counts."""
    path = save_single_file(tmp_path / "flux1.safetensors", guided=guided)
    seen = {}

    def from_single_file(file, *, config, dtype):
        seen["config"] = FluxTransformer2DModel.load_config(config)
        seen["file"] = file
        return FluxTransformer2DModel.from_pretrained(bases["dev"] / "transformer", dtype=dtype)

    monkeypatch.setattr(FluxTransformer2DModel, "from_single_file", from_single_file)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda repo, **_: seen.update(repo=repo) or
                        bases["dev"])  # fmt: skip
    monkeypatch.setattr(flux, "snapshot_download", lambda *_, **__: None)
    pipe = load_pipeline(str(path), dtype=torch.float32)
    assert type(pipe) is FluxPipeline
    assert seen["file"] == str(path)
    assert seen["config"]["guidance_embeds"] is guided
    assert seen["config"]["num_layers"] == 19
    assert seen["repo"] == flux.HUB_IDS["flux-dev" if guided else "flux-schnell"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (2, 4)}, r"2 double and 4 single blocks, and an entry of shape \(3072, 64\)"),
        (
            {"entry": (192, 64)},
            r"19 double and 38 single blocks, and an entry of shape \(192, 64\)",
        ),
    ],
)
def test_a_single_file_of_another_shape_is_refused(tmp_path, changes, message):
    path = save_single_file(tmp_path / "small.safetensors", **changes)
    for use in (build_meta_models, build_meta_transformer):
        with pytest.raises(ValueError, match=f"{message}; a single file must be FLUX.1's"):
            use(path)


def test_a_single_file_of_diffusers_names_is_counted_alike(bases):
    (path,) = (bases["dev"] / "transformer").glob("*.safetensors")
    with pytest.raises(ValueError, match=r"1 double and 2 single blocks, and an entry of shape"):
        build_meta_models(path)


def test_text_is_as_long_as_a_model_learnt(tmp_path):
    for guided, length in ((True, 512), (False, 256)):
        config = tmp_path / "transformer" / "config.json"
        config.parent.mkdir(exist_ok=True)
        config.write_text(json.dumps({"guidance_embeds": guided}))
        assert flux.read_text_tokens(tmp_path) == length
        path = save_single_file(tmp_path / "flux1.safetensors", guided=guided)
        assert flux.read_text_tokens(path) == length
    assert flux.read_text_tokens(flux.PACKAGED["miniature-schnell"]) == 64


def test_files_that_are_no_model(tmp_path):
    path = tmp_path / "flux.ckpt"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="only those are loaded"):
        fetch_model(str(path))
    path = tmp_path / "x.safetensors"
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="holds no FLUX transformer"):
        load_pipeline(str(path), dtype=torch.float32)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_pipeline(str(path), dtype=torch.float32)


def test_a_damaged_model_index(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is damaged"):
        fetch_model(str(tmp_path))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder_2"])
def test_damaged_and_pickled_weights_are_refused_before_loading(bases, tmp_path, component):
    folder = shutil.copytree(bases["dev"], tmp_path / "model")
    (path,) = (folder / component).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{component}/.* is not a complete safetensors file"):
        fetch_model(str(folder))
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(
        ValueError, match=rf"{component}/.*\.bin is not a .safetensors file; only th"
    ):
        fetch_model(str(folder))


def test_a_pipe_saved_with_adapters_on_is_refused(load_pipe, expected, tmp_path):
    pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors")
    pipe.save_pretrained(tmp_path / "adapted")
    with pytest.raises(
        ValueError, match="transformer was saved with adapters attached; load the orig"
    ):
        fetch_model(str(tmp_path / "adapted"))
    urae.restore(pipe).save_pretrained(tmp_path / "restored")
    assert fetch_model(str(tmp_path / "restored")) == tmp_path / "restored"


@pytest.mark.parametrize(
    "missing", ["vae", "tokenizer_2", "scheduler", "transformer/*.safetensors"]
)
def test_a_folder_that_lacks_a_part_is_refused_before_loading(bases, tmp_path, missing):
    folder = shutil.copytree(bases["dev"], tmp_path / "model")
    for path in folder.glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    told = re.escape(f"model folder {folder} is incomplete: {missing} is missing; copy or download")
    with pytest.raises(ValueError, match=told):
        load_pipeline(str(folder), dtype=torch.float32)
    component = missing.split("/")[0]
    assert fetch_model(str(folder), without=[component]) == folder


def test_configs_do_without_weights(bases, tmp_path):
    no_weights = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(bases["dev"], tmp_path / "model", ignore=no_weights)
    assert build_meta_models(folder)["vae"].device.type == "meta"


def test_all_shards_of_the_index_must_be_there(bases, tmp_path):
    folder = shutil.copytree(bases["dev"], tmp_path / "model")
    transformer = load_transformer(folder, dtype=torch.float32)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert fetch_model(str(folder)) == folder
    last = sorted((folder / "transformer").glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ValueError, match=f"is incomplete: transformer/{last.name} is missing"):
        fetch_model(str(folder))


def test_a_fingerprint_follows_the_files(bases, tmp_path):
    one = fingerprint_component(bases["dev"], "vae")
    assert one != fingerprint_component(bases["dev"], "transformer")
    (tmp_path / "vae").mkdir()
    weights = tmp_path / "vae" / "w.safetensors"
    save_file({"x": torch.ones(100_000)}, weights)
    before = fingerprint_component(tmp_path, "vae")
    save_file({"x": torch.ones(100_000).index_fill_(0, torch.tensor([7]), 2)}, weights)
    assert fingerprint_component(tmp_path, "vae") != before


def test_one_forward_is_the_pipelines(load_pipe, rel):
    """`predict_velocity` on unpacked latents is one step of a stock pipeline."""
    pipe = load_pipe()
    latents = torch.randn(1, 16, 8, 12)
    embeds, pooled = encode_prompts(pipe, ["a red circle"], max_sequence_length=32)
    assert embeds.shape == (1, 32, 32)
    with torch.no_grad():
        velocity = predict_velocity(
            pipe.transformer, latents, torch.ones(1), embeds, pooled, guidance_scale=3.5
        )
    result = pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        height=64,
        width=96,
        num_inference_steps=1,
        guidance_scale=3.5,
        latents=pipe._pack_latents(latents, 1, 16, 8, 12),
        output_type="latent",
    ).images
    stepped = pipe._unpack_latents(result, 64, 96, 8)
    # one Euler step from sigma 1 to 0
    assert rel(stepped, latents - velocity) < 1e-5


def test_latent_scale(bases, load_pipe):
    scale, config = read_latent_scale(bases["dev"]), load_pipe().vae.config
    assert (scale.shift_factor, scale.scaling_factor) == (
        config.shift_factor,
        config.scaling_factor,
    )
    assert torch.allclose(scale.normalize(torch.full((1,), scale.shift_factor)), torch.zeros(1))


def test_original_weights_from_memory_and_from_files(bases, tmp_path):
    transformer = load_transformer(bases["dev"], dtype=torch.bfloat16)
    names = find_attention_linears(transformer)
    live = open_original_weights(transformer, names)
    files = open_weight_files(bases["dev"], names)
    for name in names:
        assert live[name]().dtype == torch.float32
        assert torch.equal(live[name](), files[name]().bfloat16().float())
    transformer.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = open_weight_files(tmp_path, names)
    assert torch.equal(sharded[names[0]](), live[names[0]]())
    with pytest.raises(FileNotFoundError, match=r"holds no original weights for x"):
        open_weight_files(tmp_path, ["x"])
    with pytest.raises(FileNotFoundError, match="is a single file"):
        open_weight_files(next(tmp_path.glob("*.safetensors")), names)


def test_original_weights_in_the_hubs_cache(bases, monkeypatch, tmp_path):
    """A transformer that was quantised while loading by hub id, as diffusers' own docs do."""
    transformer = load_transformer(bases["dev"], dtype=torch.float32)
    names = find_attention_linears(transformer)
    wanted = open_weight_files(bases["dev"], names)[names[0]]()
    transformer.transformer_blocks[0].attn.to_q.to(torch.float8_e4m3fn)
    transformer.register_to_config(_name_or_path="owner/flux")
    monkeypatch.setattr(weights, "snapshot_download", lambda repo, **_: str(bases["dev"]))
    assert torch.equal(open_original_weights(transformer, names)[names[0]](), wanted)
    quantised = {f"{name}.weight": torch.ones(64, 64).to(torch.int8) for name in names}
    save_file(quantised, tmp_path / "model.safetensors")
    monkeypatch.setattr(weights, "snapshot_download", lambda repo, **_: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"holds quantised weights \(I8\)"):
        open_original_weights(transformer, names)


def test_components_to_leave_out_are_known(bases):
    with pytest.raises(ValueError, match=r"without \['t5'\] must name components: transformer"):
        load_pipeline(str(bases["dev"]), dtype=torch.float32, without=["t5"])
