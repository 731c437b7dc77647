"""From prompts to PNG files at 2K and 4K."""

from urae.generate.config import GenerateConfig
from urae.generate.job import Progress, generate

__all__ = ["GenerateConfig", "Progress", "generate"]
