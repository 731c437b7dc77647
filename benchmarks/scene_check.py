"""Measure the scene check: what it passes that it should, what it passes that it should not.

    python benchmarks/scene_check.py --count 300
    python benchmarks/scene_check.py --count 50 --sizes 256 512 --vae vae.safetensors

Near misses are captions with one wrong word. Degraded renders stand for the decoder's
reconstructions: a blur of 0.7 pixels, noise of 4 levels, JPEG of quality 85. Enlarged ones are
rendered at half the size and resized, so that their texture has twice its scale. With a VAE of the
miniature's, its reconstructions are measured too.
"""

import argparse
import platform
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from urae.geometry import parse_size
from urae.miniature.autoencoder import load_vae, to_pixels
from urae.miniature.check import SceneReport, compare, score
from urae.miniature.photograph import blur, decode_picture, encode_picture
from urae.miniature.read import Reading, read_picture
from urae.miniature.render import render
from urae.miniature.sources import PARTS, make_wrong
from urae.miniature.world import Scene, sample_scene

FIRST_SEED = 10**9
BLUR_PIXELS, NOISE_LEVELS, JPEG_QUALITY = 0.7, 4.0, 85


def degrade(picture: Tensor, seed: int) -> Tensor:
    """Blur an 8-bit picture, add noise, and compress it."""
    generator = torch.Generator().manual_seed(seed)
    changed = blur(picture[None].float(), BLUR_PIXELS)[0]
    changed += NOISE_LEVELS * torch.randn(picture.shape, generator=generator)
    changed = changed.round().clamp(0, 255).byte()
    return decode_picture(encode_picture(changed, "JPEG", quality=JPEG_QUALITY))


def enlarge(picture: Tensor) -> Tensor:
    """Double an 8-bit picture's sides."""
    large = F.interpolate(picture[None].float(), scale_factor=2, mode="bicubic")[0]
    return large.round().clamp(0, 255).byte()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, picture: Tensor) -> Tensor:
    """Encode an 8-bit picture and decode it."""
    found = vae.decode(vae.encode(to_pixels(picture[None])).latent_dist.mean).sample[0]
    return ((found.clamp(-1, 1) + 1) * 127.5).round().byte()


def measure(
    scenes: list[Scene], height: int, width: int, vae: AutoencoderKL | None
) -> tuple[dict[str, str], float]:
    """Return the rates of one size by name, and the median seconds of reading a picture."""
    seconds = []

    def read(draw: Callable[[Scene], Tensor]) -> list[Reading]:
        readings = []
        for scene in scenes:
            picture = draw(scene)
            start = time.perf_counter()
            readings.append(read_picture(picture))
            seconds.append(time.perf_counter() - start)
        return readings

    true = read(lambda scene: render([scene], height, width)[0])
    degraded = read(lambda scene: degrade(render([scene], height, width)[0], scene.seed))
    rates = {
        "true renders": rate(map(compare, true, scenes)),
        "degraded renders": rate(map(compare, degraded, scenes)),
    }
    if vae is not None:
        decoded = read(lambda scene: reconstruct(vae, render([scene], height, width)[0]))
        rates["reconstructions"] = rate(map(compare, decoded, scenes))
    if height % 32 == width % 32 == 0 and min(height, width) >= 512:
        large = read(lambda scene: enlarge(render([scene], height // 2, width // 2)[0]))
        rates["enlarged twice"] = rate(map(compare, large, scenes))
    rates["another caption"] = rate(map(compare, true, scenes[1:] + scenes[:1]))
    rng = random.Random(0)
    for part in PARTS:
        pairs = [
            (reading, make_wrong(scene.description, part, rng))
            for reading, scene in zip(true, scenes, strict=True)
            if part != "relation" or len(scene.objects) > 1
        ]
        rates[f"wrong {part}"] = rate(compare(*pair) for pair in pairs)
    return rates, sorted(seconds)[len(seconds) // 2]


def rate(reports: Iterable[SceneReport]) -> str:
    """Say the share that passes with its interval."""
    found = score(list(reports))
    return f"{found.share:.1%} ({found.low:.1%} to {found.high:.1%})"


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=300, help="scenes a size")
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["192", "256", "512", "1024", "384x256", "512x1024"],
        metavar="SIZE",
    )
    parser.add_argument("--vae", type=Path, help="weights of a VAE stage of the miniature")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = load_vae(arguments.vae, torch.device("cpu"))[0] if arguments.vae else None

    scenes = [sample_scene(FIRST_SEED + n) for n in range(arguments.count)]
    columns = [measure(scenes, *parse_size(size), vae) for size in arguments.sizes]
    print(f"| pass | {' | '.join(arguments.sizes)} |")
    print(f"|---|{'---|' * len(columns)}")
    for name in dict.fromkeys(name for rates, _ in columns for name in rates):
        print(f"| {name} | {' | '.join(rates.get(name, '-') for rates, _ in columns)} |")
    print(f"| seconds a picture | {' | '.join(f'{seconds:.3f}' for _, seconds in columns)} |")
    print(
        f"\n{arguments.count} scenes a size, 95% intervals; "
        f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
