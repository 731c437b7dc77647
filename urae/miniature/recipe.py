"""What the miniature is trained with: one TOML file, a section a stage."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from urae.config import build_config, read_toml
from urae.miniature.loop import LoopConfig


@dataclass(frozen=True)
class VaeStage:
    """The autoencoder, on renders of all sizes."""

    loop: LoopConfig
    pixels: int = 2**21
    """Of a batch."""
    large_sides: tuple[int, ...] = (512, 1024)
    """Pictures are 256 x 256, or of one of these sides."""
    large_share: float = 0.2
    """Of the batches, those of larger pictures."""
    num_scenes: int = 16_384
    """Rendered once, before the first step, at native size; of each larger one, as many pixels."""
    num_held_out: int = 32
    """Scenes that the finished autoencoder is measured on."""
    edge_weight: float = 1.0
    """Of the absolute error of each level of a Laplacian pyramid beside that of the pixels."""
    kl_weight: float = 1e-4
    """Of the mean divergence of a latent from the unit normal, in nats."""


@dataclass(frozen=True)
class TextStage:
    """The text encoders, on captions."""

    loop: LoopConfig
    batch_size: int = 256
    """Captions a step."""
    num_captions: int = 65_536
    """Written once, before the first step."""
    num_held_out: int = 1000
    """Captions that the finished encoders are measured on."""


@dataclass(frozen=True)
class FlowStage:
    """A transformer on the latents of renders."""

    loop: LoopConfig
    batch_size: int = 256
    """Scenes a step."""
    num_scenes: int = 131_072
    """Rendered and encoded once, before the first step."""
    side: int = 256
    """Of the pictures in pixels."""
    caption_dropout: float = 0.1
    """Share of empty captions, for classifier-free guidance."""
    sigma_shift: float = 3.0
    """Time shift of sigmas drawn uniformly: the layout is decided at the noisiest. A teacher is
    sampled with it."""
    object_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """How often a scene of one, two and three objects is drawn, beside one another."""


@dataclass(frozen=True)
class DistillStage:
    """A guided student of the transformer with classifier-free guidance, or one of few steps."""

    loop: LoopConfig
    batch_size: int = 256
    """Scenes a step."""
    num_scenes: int = 65_536
    """As in the base stage."""
    guidance: tuple[float, float] = (1.0, 5.0)
    """Scales are drawn uniformly between these."""
    object_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """As in the base stage."""
    sigma_shift: float = 3.0
    """Time shift of sigmas: of the guided student's, drawn uniformly or on the guided paths, and of
    the four steps."""


@dataclass(frozen=True)
class MiniatureRecipe:
    """All stages."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    vae: VaeStage
    text: TextStage
    base: FlowStage
    refined: FlowStage
    dev: DistillStage
    schnell: DistillStage
    teacher_256: FlowStage
    teacher_512: FlowStage
    teacher_1024: FlowStage
    seed: int = 0
    """Of weights and noise; the scenes are the same for all."""


def load_recipe(path: Path) -> MiniatureRecipe:
    """Read a recipe.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a field is missing, unknown or out of range.
    """
    return build_config(MiniatureRecipe, read_toml(path), str(path))
