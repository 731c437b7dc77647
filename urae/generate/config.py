"""What to generate: one typed object, from the command line or Python."""

import math
from dataclasses import dataclass
from pathlib import Path

from urae.backbones.flux import MAX_TEXT_TOKENS
from urae.choices import Memory, Speed
from urae.config import check_types
from urae.generate.estimate import QUANTIZED
from urae.generate.parts import EXACT, resolve_parts
from urae.generate.progressive import check_halves
from urae.geometry import check_size
from urae.resolution import ResolutionPolicy

_MAX_GUIDANCE = 1000  # far above what any model was trained with


@dataclass(frozen=True)
class GenerateConfig:
    """A set of pictures."""

    prompts: tuple[str, ...]
    """One or more; each gives `num_images` pictures."""
    model: str = "flux-dev"
    """Base: a name as flux-dev or miniature-dev, a hub id, a folder or a .safetensors file."""
    height: int = 1024
    """Pixels, a multiple of 16."""
    width: int = 1024
    """Pixels, a multiple of 16."""
    adapters: tuple[str, ...] = ()
    """Ultra-resolution adapters in order: files, folders, names as miniature-2k, or
    owner/repo/file on the hub."""
    loras: tuple[tuple[str, float], ...] = ()
    """Other LoRAs on top, each with its weight."""
    policy: ResolutionPolicy | None = None
    """By default what the adapters' metadata says, else the base's own."""
    steps: int | None = None
    """Denoising steps; by default the model's: 28 for dev, 4 for schnell."""
    guidance_scale: float | None = None
    """Distilled guidance; by default the model's: 3.5 for dev, 0 for schnell, which has none."""
    max_sequence_length: int | None = None
    """Text tokens; by default the model's: 512 for FLUX.1-dev, 256 for schnell."""
    seed: int | None = None
    """Of the first picture of each prompt, the next have seed + 1 ...; drawn if not given."""
    num_images: int = 1
    """Pictures a prompt."""
    output_dir: Path = Path("outputs")
    """Where the PNG files go."""
    overwrite: bool = False
    """Replace pictures of the same name."""
    resume: bool = False
    """Keep this job's pictures that are there, by what their files hold, and make the others."""
    memory: Memory = "auto"
    """Where the transformer's weights live: all on the device, streamed a block ahead, the whole
    model in turn, or in 8 or 4 bits, which approximates; `auto` takes the first that fits."""
    speed: Speed = "exact"
    """What makes it faster: `fast` and `turbo` approximate, as far as was measured."""
    parts: tuple[str, ...] = ()
    """More of what makes it faster, each NAME or NAME=STRENGTH."""

    @property
    def approximations(self) -> list[str]:
        """Of the parts that are named, those that change more than the rounding."""
        return [str(part) for part in resolve_parts(None, self.parts) if part.name not in EXACT]

    def __post_init__(self) -> None:
        check_types(self)
        check_size(self.height, self.width)
        resolve_parts(self.speed, self.parts)
        if any(part.name == "progressive" for part in resolve_parts(None, self.parts)):
            check_halves(self.height, self.width)
        if self.memory in QUANTIZED and "compile" in self.parts:
            raise ValueError(
                f"--part compile cannot be combined with --memory {self.memory}, whose blocks are "
                "never compiled; leave one of them out"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite cannot be combined; choose one of them")
        if self.resume and self.seed is None:
            raise ValueError(
                "resume needs a seed; without one, each job picks its own and makes other "
                "pictures (the seed of a picture is in its name)"
            )
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("a prompt is empty; each must have some text")
        for prompt in self.prompts:
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise ValueError(
                    f"prompt {prompt!r} is not UTF-8; set the terminal or file to UTF-8"
                )
        for name in ("steps", "num_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        guidance = self.guidance_scale
        if guidance is not None and not 0 <= guidance <= _MAX_GUIDANCE:
            raise ValueError(f"guidance_scale {guidance} must be between 0 and {_MAX_GUIDANCE}")
        length = self.max_sequence_length
        if length is not None and not 1 <= length <= MAX_TEXT_TOKENS:
            raise ValueError(
                f"max_sequence_length {length} must be between 1 and {MAX_TEXT_TOKENS} (T5 tokens)"
            )
        for source, weight in self.loras:
            if not math.isfinite(weight):
                raise ValueError(f"weight {weight} of LoRA {source} must be a finite number")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be between 0 and 2^63 - 1")
        if self.seed is not None and self.seed + self.num_images > 2**63:
            raise ValueError(
                f"seed {self.seed} is too large for {self.num_images} pictures, each of which has "
                "the next one, up to 2^63 - 1; choose a smaller one"
            )
