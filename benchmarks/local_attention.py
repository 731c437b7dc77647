"""Time full against local attention: one layer, and a whole FLUX-shaped forward, random weights.

    python benchmarks/local_attention.py --sides 2048 4096

runs in bfloat16 on a GPU (the forward takes 24 GB of weights). Without a GPU, by default, it tries
one small picture and a tiny model in float32, where local attention is masked and saves nothing.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from measure import describe_run, peak_gib, reset_peak, stopwatch, synchronize
from report import table
from torch import Tensor

from urae.backbones.devices import pick_device, pick_dtype
from urae.backbones.random_flux import build_meta_flux
from urae.geometry import TOKEN_PIXELS, build_image_ids, build_text_ids
from urae.local_attention import LocalAttention, build_local_attention
from urae.resolution import ResolutionPolicy, apply_policy

FLUX = ResolutionPolicy(attention="local")
TINY = ResolutionPolicy(attention="local", native_sequence_length=80)
CHECK_TOKENS = 12_000  # the spelt-out mask and float32 are for short sequences


def time_median(run: Callable[[], Any], repeats: int) -> list[float | str | None]:
    """Run and count all but the first; return seconds and the peak of memory in GiB."""
    seconds = []
    reset_peak()
    try:
        for _ in range(1 + repeats):
            synchronize()
            with stopwatch() as read_seconds:
                run()
            seconds.append(read_seconds())
    except torch.OutOfMemoryError:
        return ["out of memory", None]
    return [sorted(seconds[1:])[repeats // 2], peak_gib()]


def build_attend(pattern: LocalAttention | None, on_gpu: bool) -> Callable[..., Tensor]:
    """Build one layer's attention as the transformer runs it: FlexAttention compiled on a GPU."""
    backend = "native" if pattern is None or not on_gpu else "flex"
    mask = None
    if pattern is not None:
        mask = pattern.block_mask if on_gpu else pattern.build_mask()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value, attn_mask=mask)

    run = torch.compile(attend) if backend == "flex" else attend

    def attend_there(*tensors: Tensor) -> Tensor:
        with attention_backend(backend):
            return run(*tensors)

    return attend_there


def draw_heads(length: int, heads: int, head_dim: int, like: Tensor) -> list[Tensor]:
    """Draw query, key and value, 1 x tokens x heads x channels."""
    generator = torch.Generator(like.device).manual_seed(length)
    shape = (1, length, heads, head_dim)
    return [
        torch.randn(shape, generator=generator, device=like.device).to(like.dtype) for _ in range(3)
    ]


def differentiate(attend: Callable[..., Tensor], heads: list[Tensor]) -> list[Tensor]:
    """Return output and gradients for a gradient of the output that is the query."""
    leaves = [each.detach().requires_grad_() for each in heads]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, heads[0])]


def measure_error(
    attend: Callable[..., Tensor], pattern: LocalAttention, heads: list[Tensor]
) -> str | None:
    """Compare output and gradients with a spelt-out mask in float32: the largest difference."""
    if len(pattern.groups) > CHECK_TOKENS:
        return None
    mask = pattern.build_mask()

    def attend_masked(*tensors: Tensor) -> Tensor:
        with attention_backend("native"):
            return dispatch_attention_fn(*tensors, attn_mask=mask)

    found = differentiate(attend, heads)
    wanted = differentiate(attend_masked, [each.float() for each in heads])
    errors = [
        float((one.float() - other).norm() / other.norm())
        for one, other in zip(found, wanted, strict=True)
    ]
    return f"{max(errors):.1e}"


def measure_density(pattern: LocalAttention) -> str:
    """Count the blocks that FlexAttention visits, and of them those that it masks inside."""
    mask = pattern.block_mask
    partial, full = (int(each.sum()) for each in (mask.kv_num_blocks, mask.full_kv_num_blocks))
    share = (partial + full) / mask.kv_num_blocks.numel() ** 2
    return f"{share:.3f}, {partial / (partial + full):.0%} masked"


def measure_layer(
    side: int, policy: ResolutionPolicy, config: Any, like: Tensor, num_text: int, repeats: int
) -> list[list[Any]]:
    """Time one layer's attention, forward and forward with backward."""
    tokens = side // TOKEN_PIXELS
    pattern = build_local_attention(tokens, tokens, num_text, policy.native_side, like.device)
    heads = draw_heads(
        len(pattern.groups), config.num_attention_heads, config.attention_head_dim, like
    )
    rows = []
    on_gpu = like.device.type == "cuda"
    for name, chosen in (("full", None), ("local", pattern)):
        attend = build_attend(chosen, on_gpu)
        with torch.no_grad():
            forward = time_median(lambda attend=attend: attend(*heads), repeats)
        both = time_median(lambda attend=attend: differentiate(attend, heads), repeats)
        error = density = None
        if chosen is not None:
            error = measure_error(attend, chosen, heads)
            density = measure_density(chosen)
        rows.append([f"{side} x {side}", name, density, *forward, *both, error])
    return rows


def build_transformer(device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Build FLUX.1-dev's transformer, or a tiny one without a GPU, initialised as torch does."""
    config = build_meta_flux("flux-dev" if device.type == "cuda" else "tiny")["transformer"].config
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        transformer = FluxTransformer2DModel.from_config(config)
    torch.set_default_dtype(before)
    return transformer.eval().requires_grad_(False)


@torch.no_grad()
def measure_forward(
    transformer: FluxTransformer2DModel,
    side: int,
    policy: ResolutionPolicy,
    num_text: int,
    repeats: int,
) -> list[list[Any]]:
    """Time a whole forward under the policy, with full and with local attention."""
    config, device, dtype = transformer.config, transformer.device, transformer.dtype
    tokens = side // TOKEN_PIXELS
    generator = torch.Generator(device).manual_seed(side)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs = {
        "hidden_states": draw(1, tokens**2, config.in_channels),
        "encoder_hidden_states": draw(1, num_text, config.joint_attention_dim),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.ones(1, device=device, dtype=dtype),
        "img_ids": build_image_ids(tokens, tokens, device),
        "txt_ids": build_text_ids(num_text, device),
        "return_dict": False,
    }
    rows = []
    for attention in ("full", "local"):
        apply_policy(transformer, replace(policy, attention=attention))
        figures = time_median(lambda: transformer(**inputs), repeats)
        rows.append([f"{side} x {side}", attention, *figures])
    return rows


def main() -> None:
    """Run the benchmark and print its tables."""
    device = pick_device() if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[1280, 2048, 4096] if on_gpu else [256]
    )
    parser.add_argument("--text", type=int, default=512 if on_gpu else 16, help="text tokens")
    parser.add_argument("--parts", nargs="+", default=["layer", "forward"])
    parser.add_argument("--repeats", type=int, default=5, help="at least 1")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", module="torch")
    policy, text, repeats = FLUX if on_gpu else TINY, arguments.text, arguments.repeats
    like = torch.empty(0, device=device, dtype=pick_dtype(device))
    if "layer" in arguments.parts:
        config = build_meta_flux("flux-dev" if on_gpu else "tiny")["transformer"].config
        rows = []
        for side in arguments.sides:
            rows += measure_layer(side, policy, config, like, text, repeats)
        header = ["one layer", "attention", "blocks visited", "forward, s", "GiB"]
        header += ["forward and backward, s", "GiB", "error"]
        print("\n".join(table(header, rows)) + "\n")
    if "forward" in arguments.parts:
        transformer = build_transformer(device, like.dtype)
        if on_gpu:
            transformer.compile_repeated_blocks()
        rows = []
        for side in arguments.sides:
            rows += measure_forward(transformer, side, policy, text, repeats)
        header = ["one forward", "attention", "s", "peak with weights, GiB"]
        print("\n".join(table(header, rows)) + "\n")
    print(f"{describe_run()}; {like.dtype}")


if __name__ == "__main__":
    main()
