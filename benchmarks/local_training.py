"""Find what a training step with local attention spends its time on: kernels, then variants.

    python benchmarks/local_training.py --side 4096

profiles a step of one double and two single blocks of FLUX.1-dev's shape, random weights in
bfloat16, and times one layer's attention in several forms. Without a GPU it tries a tiny one.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from local_attention import FLUX, TINY, differentiate, draw_heads, time_median
from measure import describe_run, synchronize
from report import table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.profiler import ProfilerActivity, profile

from urae.adapters.attach import attach_trainable
from urae.adapters.files import LowRank
from urae.backbones.devices import pick_device, pick_dtype
from urae.backbones.flux import predict_velocity
from urae.backbones.random_flux import build_meta_flux
from urae.backbones.weights import find_attention_linears, linear_shape
from urae.geometry import TOKEN_PIXELS
from urae.local_attention import LocalAttention, build_local_attention
from urae.resolution import ResolutionPolicy, apply_policy
from urae.train.attention import choose_attention
from urae.train.estimate import Way
from urae.train.recompute import set_checkpointing

RANK = 16
BLOCKS = {"num_layers": 1, "num_single_layers": 2}
"""Single blocks after the first have inputs that are strided otherwise."""


def build_variants(pattern: LocalAttention, on_gpu: bool) -> dict[str, Callable[..., Tensor]]:
    """Build one layer's attention in each form, from batch x tokens x heads x channels."""
    mask = pattern.block_mask
    safe = {"ROWS_GUARANTEED_SAFE": True}  # each token sees itself

    def build(
        mask: BlockMask,
        options: dict[str, Any] | None = None,
        mode: str | None = None,
        *,
        contiguous: bool = False,
    ) -> Callable[..., Tensor]:
        def attend(*tensors: Tensor) -> Tensor:
            heads = [each.transpose(1, 2) for each in tensors]
            if contiguous:
                heads = [each.contiguous() for each in heads]
            output = flex_attention(*heads, block_mask=mask, kernel_options=options)
            assert isinstance(output, Tensor)
            return output.transpose(1, 2)

        return torch.compile(attend, mode=mode) if on_gpu else attend

    return {
        "as it is": build(mask),
        "rows said to be safe": build(mask, safe),
        "heads made contiguous": build(mask, contiguous=True),
        "autotuned": build(mask, mode="max-autotune-no-cudagraphs"),
        "safe, autotuned": build(mask, safe, "max-autotune-no-cudagraphs"),
    }


def measure_variants(
    pattern: LocalAttention, config: Any, like: Tensor, repeats: int
) -> list[list[Any]]:
    """Time each form; FlexAttention has no backward on a CPU."""
    heads = draw_heads(
        len(pattern.groups), config.num_attention_heads, config.attention_head_dim, like
    )
    on_gpu = like.device.type == "cuda"
    rows = []
    for name, attend in build_variants(pattern, on_gpu).items():
        torch.compiler.reset()
        with torch.no_grad():
            forward = time_median(lambda attend=attend: attend(*heads), repeats)
        both: list[Any] = [None, None]
        if on_gpu:
            both = time_median(lambda attend=attend: differentiate(attend, heads), repeats)
        rows.append([name, *in_milliseconds(*forward), *in_milliseconds(*both)])
    return rows


def in_milliseconds(seconds: Any, gib: Any) -> list[Any]:
    """Give a layer's time in a unit that shows it, unless it is none."""
    return [1000 * seconds if isinstance(seconds, float) else seconds, gib]


def build_training(
    policy: ResolutionPolicy, checkpointing: Any, like: Tensor
) -> FluxTransformer2DModel:
    """Build a few blocks with a LoRA that trains, as `urae train` runs them."""
    on_gpu = like.device.type == "cuda"
    whole = build_meta_flux("flux-dev" if on_gpu else "tiny")["transformer"].config
    # without the list of what was left at its default, which would be so again
    whole = {name: value for name, value in whole.items() if not name.startswith("_")}
    torch.manual_seed(0)
    with torch.device(like.device):
        transformer = FluxTransformer2DModel.from_config({**whole, **BLOCKS}).to(like.dtype)
    layers = {}
    for name in find_attention_linears(transformer):
        rows, columns = linear_shape(transformer, name) or (0, 0)
        layers[name] = LowRank(torch.randn(RANK, columns) / columns**0.5, torch.zeros(rows, RANK))
    attach_trainable(transformer, "new", layers)
    apply_policy(transformer, policy)
    way = Way("resident", checkpointing)
    set_checkpointing(transformer.train(), way, like.device, compiled=on_gpu)
    return transformer


def profile_step(
    transformer: FluxTransformer2DModel, side: int, num_text: int, like: Tensor, repeats: int
) -> tuple[list[Any], str]:
    """Time a step's forward and backward, then list the kernels of one."""
    config, cells = transformer.config, side // 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=like.device).to(like.dtype)

    inputs = (
        draw(1, config.in_channels // 4, cells, cells),
        torch.full((1,), 0.5, device=like.device),
        draw(1, num_text, config.joint_attention_dim),
        draw(1, config.pooled_projection_dim),
    )

    def step() -> None:
        predict_velocity(transformer, *inputs, 1.0).float().square().mean().backward()

    figures = time_median(step, repeats)
    activity = ProfilerActivity.CUDA if like.is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        step()
        synchronize()
    order = "self_cuda_time_total" if like.is_cuda else "self_cpu_time_total"
    return figures, found.key_averages().table(
        sort_by=order, row_limit=20, max_name_column_width=90
    )


def main() -> None:
    """Print the tables."""
    device = pick_device() if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=4096 if on_gpu else 256)
    parser.add_argument("--text", type=int, default=512 if on_gpu else 16, help="text tokens")
    parser.add_argument("--parts", nargs="+", default=["profile", "variants"])
    parser.add_argument("--repeats", type=int, default=3, help="at least 1")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    side, text, repeats = arguments.side, arguments.text, arguments.repeats
    local = FLUX if on_gpu else TINY
    like = torch.empty(0, device=device, dtype=pick_dtype(device))
    if "profile" in arguments.parts:
        full = ResolutionPolicy(native_sequence_length=local.native_sequence_length)
        rows, kernels = [], []
        for policy, kept in ((full, "full"), (local, "full"), (local, "selective")):
            torch.compiler.reset()
            transformer = build_training(policy, kept, like)
            shape = {
                "heads": transformer.config.num_attention_heads,
                "head_dim": transformer.config.attention_head_dim,
                "tokens": text + (side // TOKEN_PIXELS) ** 2,
            }
            with attention_backend(choose_attention(device, like.dtype, **shape)):
                figures, listed = profile_step(transformer, side, text, like, repeats)
            rows.append([f"{policy.attention} attention, checkpointing {kept}", *figures])
            kernels.append(f"{rows[-1][0]}\n{listed}")
            del transformer
        print(
            "\n".join(table(["one double block, two single", "step, s", "peak, GiB"], rows)) + "\n"
        )
        print("\n".join(kernels))
    if "variants" in arguments.parts:
        config = build_meta_flux("flux-dev" if on_gpu else "tiny")["transformer"].config
        tokens = side // TOKEN_PIXELS
        pattern = build_local_attention(tokens, tokens, text, local.native_side, device)
        rows = measure_variants(pattern, config, like, repeats)
        header = ["one layer", "forward, ms", "GiB", "forward and backward, ms", "GiB"]
        print("\n".join(table(header, rows)) + "\n")
    print(f"{describe_run()}; {like.dtype}")


if __name__ == "__main__":
    main()
