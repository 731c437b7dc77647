"""The model card of a finished run: what the hub shows of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from urae.backbones.flux import (
    HUB_IDS,
    MAX_UNGUIDED_TEXT_TOKENS,
    PACKAGED,
    fetch_model,
    read_text_tokens,
)
from urae.train.config import TrainConfig
from urae.train.preview import Preview

CURVES_FILE = "curves.png"

_FLUX_DEV_LICENSE = "flux-1-dev-non-commercial-license"


@dataclass(frozen=True)
class License:
    """Under which terms an adapter may be used."""

    id: str
    """As the hub spells it, `other` for one with a name of its own."""
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return self.name or self.id


@dataclass(frozen=True)
class CardInputs:
    """What a card says beside the run's config."""

    repo: str
    """owner/name on the hub."""
    license: License
    adapter_file: str
    """The file to use."""
    is_stock: bool
    """Whether stock `load_lora_weights` reads it."""
    step: int
    previews: Sequence[tuple[Preview, str]]
    """With the files of their last pictures."""
    record: str
    """The whole of `run.toml`."""


def find_license(model: str, given: str | None) -> License:
    """Find the licence that an adapter inherits from its base.

    Args:
        model: Base, as the recipe names it.
        given: An identifier of the hub, for a base whose licence is not known here.

    Raises:
        ValueError: If the licence is not known and none is given, or another one is given.
    """
    known = _known_license(model)
    if known is None and given is None:
        raise ValueError(
            f"the licence of the base {model} is unknown; give it with --license as the hub "
            "spells it: apache-2.0, cc-by-nc-4.0, other"
        )
    if known is not None and given not in (None, known.id, known.name):
        raise ValueError(
            f"{model} is licensed under {known}, and its adapters inherit that, not {given}; leave "
            "out --license"
        )
    return known or License(str(given))


def _known_license(model: str) -> License | None:
    hub_id = HUB_IDS.get(model, model)
    if hub_id == HUB_IDS["flux-schnell"] or model in PACKAGED:
        return License("apache-2.0")
    if hub_id in (HUB_IDS["flux-dev"], HUB_IDS["flux-krea"]):
        link = f"https://huggingface.co/{hub_id}/blob/main/LICENSE.md"
        return License("other", _FLUX_DEV_LICENSE, link)
    return None


def format_card(config: TrainConfig, inputs: CardInputs) -> str:
    """Write the README of a repository, its metadata on top.

    Args:
        config: Of the run.
        inputs: What else it says.
    """
    base = _find_hub_id(config.model)
    title = inputs.repo.split("/")[1]
    kind = config.adapter.kind
    size = f"{config.resolution} x {config.resolution}"
    sections = [
        f"---\n{_build_metadata(config, inputs, base).to_yaml()}\n---",
        f"# {title}",
        f"An ultra-resolution adapter ({_describe(kind)}, rank {config.adapter.rank}) that makes "
        f"{_link(base, config.model)} generate pictures of {size} pixels, trained for "
        f"{inputs.step:,} step{'s' if inputs.step != 1 else ''} with urae after URAE "
        "([arXiv:2503.16322](https://arxiv.org/abs/2503.16322)).",
        "## Use it",
        _format_usage(config, inputs, base),
    ]
    if inputs.previews:
        rows = [f"| {_escape(p.prompt)} | ![{p.name}]({file}) |" for p, file in inputs.previews]
        sections += ["## Previews", "\n".join(["| prompt | picture |", "|---|---|", *rows])]
    sections += [
        "## Training",
        f"![loss]({CURVES_FILE})",
        "The recipe, every field resolved, and what the run was made from:",
        f"```toml\n{inputs.record.strip()}\n```",
        "## Licence",
        _format_license(inputs.license, _link(base, config.model)),
    ]
    return "\n\n".join(sections) + "\n"


def _build_metadata(config: TrainConfig, inputs: CardInputs, base: str | None) -> ModelCardData:
    tags = ["text-to-image", "diffusers", "flux", "urae", "ultra-resolution"]
    if inputs.is_stock:
        tags += ["lora", "template:sd-lora"]  # the latter shows the widget's pictures
    more: dict[str, Any] = {"base_model_relation": "adapter"} if base else {}
    if inputs.previews:
        more["widget"] = [{"text": p.prompt, "output": {"url": f}} for p, f in inputs.previews]
    return ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=inputs.license.id,
        license_name=inputs.license.name,
        license_link=inputs.license.link,
        tags=tags,
        **more,
    )


def _format_usage(config: TrainConfig, inputs: CardInputs, base: str | None) -> str:
    side = config.resolution
    guided = "schnell" not in (base or config.model)
    options = "guidance_scale=3.5" if guided else "num_inference_steps=4, guidance_scale=0.0"
    if config.model in PACKAGED:
        options += f", max_sequence_length={read_text_tokens(fetch_model(config.model))}"
        prompt = "a large red circle on a striped green background"  # of its grammar
        start = (
            "import torch\n\nimport urae\nfrom urae.backbones.flux import load_pipeline\n\n"
            f'pipe = load_pipeline("{config.model}", dtype=torch.float32)\n'
        )
    else:
        options += "" if guided else f", max_sequence_length={MAX_UNGUIDED_TEXT_TOKENS}"
        prompt = "a lighthouse at dawn"
        start = (
            "import torch\nfrom diffusers import FluxPipeline\n\nimport urae\n\n"
            f'pipe = FluxPipeline.from_pretrained("{base or "path/to/the/base"}", '
            'dtype=torch.bfloat16).to("cuda")\n'
        )
    call = f'pipe("{prompt}", height={side}, width={side}, {options})'
    ours = (
        f'{start}urae.adapt(pipe, "{inputs.repo}/{inputs.adapter_file}")\nimage = {call}.images[0]'
    )
    text = (
        "With urae, which also sets the resolution policy that the adapter was trained with "
        f"(positions, attention, time shift):\n\n```python\n{ours}\n```\n\n"
    )
    if not inputs.is_stock:
        return f"{text}Stock `load_lora_weights` does not load this kind of adapter."
    stock = (
        f'pipe.load_lora_weights("{inputs.repo}", weight_name="{inputs.adapter_file}")\n'
        f"image = {call}.images[0]"
    )
    return (
        text + "With stock diffusers the weights load, but the resolution policy stays off:\n\n"
        f"```python\n{stock}\n```"
    )


def _format_license(license: License, base: str) -> str:
    name = f"[{license}]({license.link})" if license.link else str(license)
    return f"{name}, that of the base, {base}."


def _find_hub_id(model: str) -> str | None:
    if model in PACKAGED or Path(model).exists():
        return None
    hub_id = HUB_IDS.get(model, model)
    return hub_id if hub_id.count("/") == 1 and not hub_id.startswith(("/", ".", "~")) else None


def _link(hub_id: str | None, model: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{model}`"


def _escape(text: str) -> str:
    """Fit a text into a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _describe(kind: str) -> str:
    names = {"lora": "LoRA", "minor": "minor components", "dora": "DoRA", "lokr": "LoKr"}
    return names.get(kind, kind.upper())
