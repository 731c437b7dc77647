"""Previews: pictures of fixed prompts and noises, by the adapter as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from urae.backbones.flux import TEXT_COMPONENTS, build_meta_transformer, load_pipeline
from urae.backbones.free_memory import explain_memory
from urae.features.encoders import Encoders
from urae.generate.inputs import default_sampling
from urae.generate.picture import picture_path, save_picture
from urae.generate.sample import PromptEmbeds, decode, sample
from urae.resolution import ResolutionPolicy, shift_scheduler
from urae.train.config import TrainConfig
from urae.train.output import PREVIEW_DIR


@dataclass(frozen=True)
class Preview:
    """One picture to make again and again."""

    name: str
    """Of the folder that its pictures go into, one a step."""
    prompt: str
    seed: int


class Previewer:
    """What it takes to make previews, beside the transformer in training.

    It is built before the transformer loads: the text encoders come and go first. The VAE waits in
    the host's memory.
    """

    def __init__(self, config: TrainConfig, model_path: Path, policy: ResolutionPolicy) -> None:
        """Encode the prompts, and make a pipeline that lacks the transformer and the VAE.

        Args:
            config: Of the run.
            model_path: Of the base, as `fetch_model` found it.
            policy: Its time shift is the schedule's.
        """
        self.side = config.resolution
        self.previews = list_previews(config)
        self.sampling = default_sampling(build_meta_transformer(model_path), model_path)
        tokens = self.sampling.max_sequence_length
        encoders = Encoders(model_path)
        with explain_memory("the text encoders", "closing other programs that use the GPU"):
            self.embeds = {
                prompt: [each[None].cpu() for each in encoders.encode_caption(prompt, tokens)]
                for prompt in config.preview_prompts
            }
        encoders.free_text_encoders()
        without = ["transformer", *TEXT_COMPONENTS]
        self.pipe = load_pipeline(str(model_path), dtype=encoders.dtype, without=without)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = shift_scheduler(self.pipe.scheduler, policy)
        self.vae = self.pipe.vae
        self.pipe.register_modules(vae=None)

    @torch.no_grad()
    def draw(self, transformer: FluxTransformer2DModel, preview: Preview) -> Image.Image:
        """Make a preview with a stock pipeline; training does not notice.

        Args:
            transformer: The one in training, with its adapters and the policy on.
            preview: Which.

        Raises:
            MemoryError: If the device's memory does not suffice.
        """
        with explain_memory(f"a preview of {self.side} x {self.side} pixels", "training without"):
            return self._draw(transformer, preview)

    def _draw(self, transformer: FluxTransformer2DModel, preview: Preview) -> Image.Image:
        device = transformer.device
        embeds = PromptEmbeds(*(each.to(device) for each in self.embeds[preview.prompt]))
        self.pipe.register_modules(transformer=transformer)
        tokens = sample(self.pipe, embeds, preview.seed, self.side, self.side, self.sampling)
        self.pipe.register_modules(vae=self.vae.to(device))
        try:
            return decode(self.pipe, tokens, self.side, self.side, device)
        finally:
            self.vae.to("cpu")
            self.pipe.register_modules(vae=None)


def count_text_tokens(model_path: Path) -> int:
    """Return how many text tokens a preview has."""
    return default_sampling(build_meta_transformer(model_path), model_path).max_sequence_length


def list_previews(config: TrainConfig) -> list[Preview]:
    """List the previews of a run: each prompt with each seed."""
    return [
        Preview(picture_path(Path(), index, prompt, seed).stem, prompt, seed)
        for index, prompt in enumerate(config.preview_prompts)
        for seed in config.preview_seeds
    ]


def write_previews(
    output_dir: Path, step: int, pictures: Mapping[Preview, Image.Image], model: str
) -> None:
    """Write the previews of a step into a run's folder, each with its recipe inside."""
    for preview, image in pictures.items():
        record = {"prompt": preview.prompt, "seed": preview.seed, "model": model, "step": step}
        folder = output_dir / PREVIEW_DIR / preview.name
        save_picture(folder / f"step-{step:06d}.png", image, record)
