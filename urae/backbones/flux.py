"""FLUX.1 as stock diffusers has it: names, loading, prompt encoding and one forward."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PipelineQuantizationConfig,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from urae.backbones.model_folder import check_model
from urae.backbones.random_flux import build_meta_flux
from urae.geometry import TOKEN_PIXELS, build_image_ids, build_text_ids, pack, unpack
from urae.hub import FETCH_ERRORS, tell_reason
from urae.resolution import BASE_POLICY_FILE, read_base_policy
from urae.storage import read_shapes

logger = logging.getLogger(__name__)

HUB_IDS = {
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux-krea": "black-forest-labs/FLUX.1-Krea-dev",
}

PACKAGED = {
    folder.name: folder
    for folder in sorted((Path(__file__).parents[1] / "miniature" / "models").glob("*"))
}
"""Models that come with this package, by name."""

MAX_TEXT_TOKENS = 512
"""T5 tokens that FLUX.1 was trained with at most."""
MAX_UNGUIDED_TEXT_TOKENS = 256
"""The same of FLUX.1-schnell, which has no guidance."""
TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_COMPONENTS = ("transformer", "vae", *TEXT_COMPONENTS)

_FILE_SHAPE = (19, 38, 3072, 64)
"""FLUX.1's double and single blocks, width and channels a token: stock diffusers reads no other."""
_BLOCK = re.compile(r"(?:^|\.)(double|single|single_transformer|transformer)_blocks\.(\d+)\.")

_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 1 << 16


def fetch_model(model: str, *, without: Sequence[str] = (), configs_only: bool = False) -> Path:
    """Find a FLUX model's folder or file, downloading from the hub what is not there yet.

    Args:
        model: `miniature-dev`, `miniature-schnell`, `flux-dev`, `flux-schnell`, `flux-krea`, a hub
            id, a local folder in diffusers layout, or a single .safetensors file.
        without: Components not to download, and that a local folder may lack.
        configs_only: Download no weights at all; a local folder may lack them.

    Returns:
        A local folder, or the single file.

    Raises:
        ValueError: If a local path is no FLUX model, damaged or not whole.
        FileNotFoundError: If the hub has no such model, or it cannot be reached.
        PermissionError: If the model is gated and this user has no access.
    """
    if (path := find_local(model)) is not None:
        check_model(path, without=without, configs_only=configs_only)
        return path
    check_name(model)
    hub_id = HUB_IDS.get(model, model)
    try:
        if configs_only:
            folder = snapshot_download(hub_id, allow_patterns="*.json")
        else:
            folder = DiffusionPipeline.download(hub_id, **{name: None for name in without})
            if "transformer" in without:  # what it is decides how captions are read
                snapshot_download(hub_id, allow_patterns="transformer/config.json")
    except HFValidationError as error:
        raise _no_model(model) from error
    except FETCH_ERRORS as error:
        if _is_gated(error):
            raise PermissionError(
                f"model {hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, "
                "then log in with `hf auth login`, or point --model at a local folder"
            ) from error
        reason = tell_reason(error).split(" (")[0]
        raise FileNotFoundError(
            f"model {hub_id} could not be fetched from the hub ({reason}); check the name and the "
            "connection, log in with `hf auth login`, or point --model at a local folder"
        ) from error
    return Path(folder)


def check_name(model: str) -> None:
    """Refuse a model's name that is neither on this machine nor can be on the hub.

    Raises:
        FileNotFoundError: Says which there are.
    """
    if find_local(model) is None and "/" not in HUB_IDS.get(model, model):
        raise _no_model(model)


def _no_model(model: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"model {model!r} is neither a local path nor a hub id (owner/repo); known names: "
        f"{', '.join([*PACKAGED, *HUB_IDS])}"
    )


def find_local(model: str) -> Path | None:
    """Return a model's folder or file on this machine, None for what the hub has."""
    path = Path(model).expanduser()
    return path if path.exists() else PACKAGED.get(model)


def _is_gated(error: BaseException | None) -> bool:
    """Look through what diffusers wrapped the hub's answer in."""
    while error is not None:
        if isinstance(error, GatedRepoError):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_pipeline(
    model: str, *, dtype: torch.dtype, without: Sequence[str] = (), quantization: Any = None
) -> FluxPipeline:
    """Load a stock FLUX pipeline on the CPU.

    A single file gives the transformer alone; the rest comes from FLUX.1 on the hub.

    Args:
        model: As in `fetch_model`.
        dtype: Of all weights.
        without: Components to leave out (None in the pipeline): `transformer`, `vae`,
            `text_encoder` (CLIP), `text_encoder_2` (T5), `tokenizer`, `tokenizer_2`.
        quantization: Settings of diffusers for the transformer's weights, if any.

    Raises:
        ValueError: As `fetch_model`, and if a single file is to be quantised.
        FileNotFoundError, PermissionError: As `fetch_model`.
    """
    if unknown := sorted(set(without) - set(_COMPONENTS)):
        raise ValueError(f"without {unknown} must name components: {', '.join(_COMPONENTS)}")
    path = fetch_model(model, without=without)
    parts: dict[str, Any] = {name: None for name in without}
    logger.info("loading %s from %s", model, path)
    if path.is_file():
        if quantization is not None:  # stock from_single_file takes the weights for quantised ones
            raise ValueError(
                f"model file {path} is a single file, which cannot be quantised while it loads; "
                "name a folder in diffusers layout"
            )
        if "transformer" not in parts:
            parts["transformer"] = load_transformer(path, dtype=dtype)
        path = fetch_model(base_of_file(path), without=[*without, "transformer"])
    elif quantization is not None:
        mapping = {"transformer": quantization}
        parts["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    return FluxPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True, **parts)


def base_of_file(path: Path) -> str:
    """Tell which FLUX.1 a single-file transformer is, by its guidance embedding.

    Raises:
        ValueError: If the file is damaged, no FLUX transformer or of another shape than FLUX.1's.
    """
    shapes = read_shapes(path)
    entries = [s for k, s in shapes.items() if k.endswith(("img_in.weight", "x_embedder.weight"))]
    if not entries:
        raise ValueError(f"model file {path} holds no FLUX transformer")
    blocks = {match.groups() for match in map(_BLOCK.search, shapes) if match}
    num_single = sum(kind.startswith("single") for kind, _ in blocks)
    found = (len(blocks) - num_single, num_single, *entries[0])
    if found != _FILE_SHAPE:
        raise ValueError(
            f"model file {path} holds {found[0]} double and {found[1]} single blocks, and an entry "
            f"of shape {found[2:]}; a single file must be FLUX.1's {_FILE_SHAPE}: "
            "name a folder in diffusers layout"
        )
    guided = any("guidance_in." in key or "guidance_embedder." in key for key in shapes)
    return "flux-dev" if guided else "flux-schnell"


def fingerprint_component(folder: Path, component: str) -> str:
    """Identify a component's files without loading them.

    Args:
        folder: A model folder in diffusers layout, or a single file (its `component` is the
            whole file).
        component: `vae`, `text_encoder`, `transformer` and so on.

    Returns:
        SHA-256 over the names, sizes and evenly spaced samples of the files, 64 hex digits.
    """
    digest = hashlib.sha256()
    root = folder / component if folder.is_dir() else folder
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if file == root else file.relative_to(root)}:{size}\n".encode())
        stride = max(_SAMPLE_BYTES, size // _SAMPLES_PER_FILE)
        with file.open("rb") as stream:
            for start in range(0, size, stride):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def count_tokens(pipe: FluxPipeline, prompt: str) -> int:
    """Count the T5 tokens of a whole prompt, its end included."""
    tokenizer: Any = pipe.tokenizer_2
    return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)


@torch.no_grad()
def encode_prompts(
    pipe: FluxPipeline, prompts: list[str], *, max_sequence_length: int
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b p"]]:
    """Encode prompts with T5 and CLIP, padded to `max_sequence_length` tokens.

    Returns:
        `prompt_embeds` (T5) and `pooled_prompt_embeds` (CLIP).
    """
    prompt_embeds, pooled_prompt_embeds, _ = pipe.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        max_sequence_length=max_sequence_length,
        device=pipe.text_encoder_2.device,
    )
    return prompt_embeds, pooled_prompt_embeds


def predict_velocity(
    transformer: nn.Module,
    latents: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, " b"],
    prompt_embeds: Float[Tensor, "b l d"],
    pooled_prompt_embeds: Float[Tensor, "b p"],
    guidance_scale: float | Float[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Run a FLUX transformer on unpacked latents.

    Args:
        transformer: A stock `FluxTransformer2DModel`, adapted or not.
        latents: Noisy latents, H and W even.
        sigmas: One in [0, 1] a sample.
        prompt_embeds: T5 features.
        pooled_prompt_embeds: CLIP features.
        guidance_scale: Distilled guidance, one for all or one a sample; a model without guidance
            embedding ignores it.

    Returns:
        The velocity, noise - latents.
    """
    batch, _, height, width = latents.shape
    device = latents.device
    config: Any = transformer.config
    guidance = torch.as_tensor(guidance_scale, dtype=torch.float32, device=device).expand(batch)
    tokens = transformer(
        hidden_states=pack(latents),
        timestep=sigmas,
        guidance=guidance if config.guidance_embeds else None,
        pooled_projections=pooled_prompt_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=build_text_ids(prompt_embeds.shape[1], device),
        img_ids=build_image_ids(height // 2, width // 2, device),
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


@dataclass(frozen=True)
class LatentScale:
    """How a VAE's latents are shifted and scaled for the transformer."""

    shift_factor: float = 0.1159
    scaling_factor: float = 0.3611

    def normalize(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Turn what the VAE encodes into what the transformer denoises."""
        return (latents - self.shift_factor) * self.scaling_factor


def read_latent_scale(path: Path) -> LatentScale:
    """Read the latent scale of a fetched model; a single file has FLUX.1's."""
    if path.is_file():
        return LatentScale()
    config = AutoencoderKL.load_config(path / "vae")
    return LatentScale(config["shift_factor"], config["scaling_factor"])


def find_native_side(model: str) -> int:
    """Return the side, in pixels, of the square that a model makes by itself: FLUX.1's is 1024.

    Args:
        model: As in `fetch_model`; nothing is downloaded.
    """
    path = find_local(model)
    if path is None or not (path / BASE_POLICY_FILE).is_file():
        return 1024
    sequence_length = read_base_policy(path).native_sequence_length
    return TOKEN_PIXELS * math.isqrt(sequence_length - read_text_tokens(path))


def read_text_tokens(path: Path) -> int:
    """Read how many T5 tokens a fetched model is for: 512 of FLUX.1-dev, 256 of schnell.

    Its tokenizer may say less, as the miniature's does.
    """
    most = MAX_TEXT_TOKENS if _is_guided(path) else MAX_UNGUIDED_TEXT_TOKENS
    config = path / "tokenizer_2" / "tokenizer_config.json"
    if not config.is_file():
        return most
    length: int = json.loads(config.read_text(encoding="utf-8")).get("model_max_length", 0)
    return length if 1 <= length <= most else most


def _is_guided(path: Path) -> bool:
    """Tell whether a fetched model has distilled guidance, as dev has and schnell has not."""
    if path.is_file():
        return base_of_file(path) == "flux-dev"
    config = path / "transformer" / "config.json"
    if not config.is_file():
        return True
    settings = json.loads(config.read_text(encoding="utf-8"))
    return bool(settings.get("guidance_embeds", False))


def build_meta_transformer(path: Path) -> FluxTransformer2DModel:
    """Build a fetched model's transformer without weights, to check shapes against.

    Args:
        path: What `fetch_model` returned; a single file is taken to have FLUX.1's shape.
    """
    with torch.device("meta"):
        if path.is_file():
            return FluxTransformer2DModel(guidance_embeds=_is_guided(path))
        config = FluxTransformer2DModel.load_config(path / "transformer")
        return FluxTransformer2DModel.from_config(config)


def build_meta_models(model: str | Path) -> dict[str, nn.Module]:
    """Build a model's transformer, VAE and text encoders without weights, by their names.

    Nothing is downloaded for the names that are known, and configs only for other hub ids.

    Args:
        model: As in `fetch_model`; a single file is taken to have FLUX.1's shape.

    Raises:
        ValueError, FileNotFoundError, PermissionError: As `fetch_model`.
    """
    hub_id = HUB_IDS.get(str(model), str(model))
    if hub_id in HUB_IDS.values() and find_local(str(model)) is None:
        return build_meta_flux("flux-schnell" if "schnell" in hub_id else "flux-dev")
    path = fetch_model(str(model), configs_only=True)
    if path.is_file():
        return build_meta_flux("flux-schnell" if "schnell" in base_of_file(path) else "flux-dev")
    clip = CLIPTextConfig.from_pretrained(path / "text_encoder")
    t5 = T5Config.from_pretrained(path / "text_encoder_2")
    with torch.device("meta"):
        return {
            "transformer": build_meta_transformer(path),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(path / "vae")),
            "text_encoder": CLIPTextModel(clip),
            "text_encoder_2": T5EncoderModel(t5),
        }


def load_transformer(path: Path, *, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Load the transformer alone of a fetched model, on the CPU."""
    if path.is_file():
        with TemporaryDirectory() as folder:  # so that its config is not looked up on the hub
            build_meta_transformer(path).save_config(folder)
            return FluxTransformer2DModel.from_single_file(str(path), config=folder, dtype=dtype)
    return FluxTransformer2DModel.from_pretrained(
        path / "transformer", dtype=dtype, use_safetensors=True
    )
