"""What makes sampling faster without changing what it computes."""

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._triton import has_triton

from urae.content_cache import find_cache_dir
from urae.geometry import num_image_tokens

logger = logging.getLogger(__name__)

# on an H200 compiling took 19 s and saved 1.2e-5 s a token and step (docs/performance.md)
PAYS_FROM_TOKEN_STEPS = 1_600_000
"""Image tokens times steps from which on compiling a size takes less than it saves."""
_HOOK = "urae_compiled_forward"
_VARIANTS = 4  # of a block: for the first size and for any, attention full and local
_TOKENS = ("hidden_states", "encoder_hidden_states")  # what the transformer hands its blocks
_COMPILED_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def is_long(height: int, width: int, steps: int, num_pictures: float) -> bool:
    """Tell whether compiling the blocks would save more time than it takes, where it can be done.

    Args:
        height: Of a picture in pixels.
        width: Of a picture in pixels.
        steps: Denoising steps of a picture.
        num_pictures: In this job; of several GPUs, the share of each.
    """
    return num_image_tokens(height, width) * steps * num_pictures >= PAYS_FROM_TOKEN_STEPS


def pays_to_compile(
    device: torch.device, height: int, width: int, steps: int, num_pictures: float
) -> bool:
    """Tell whether the blocks are to be compiled: on a GPU, in a long job, with a compiler.

    Args:
        device: Where the transformer runs.
        height, width, steps, num_pictures: As `is_long`.
    """
    return is_long(height, width, steps, num_pictures) and can_compile(device)


def can_compile(device: torch.device) -> bool:
    """Tell whether blocks can be compiled where they run: on a GPU, with a compiler."""
    if device.type != "cuda":
        return False
    if lack := _find_lack(device):
        logger.warning("the blocks run uncompiled, which is slower; compiling needs %s", lack)
    return lack is None


def check_compiler(device: torch.device) -> None:
    """Refuse to compile blocks where that cannot be done; needs no weights.

    Raises:
        ValueError: If what generates or compiles their code is missing.
    """
    if lack := _find_lack(device):
        raise ValueError(
            f"compiled blocks need {lack}, which this machine lacks; install it (compilers come "
            "with apt-get install build-essential), or leave out compile"
        )


def _find_lack(device: torch.device) -> str | None:
    """Say what compiling for a device needs and this machine lacks, if anything."""
    if device.type == "cuda":
        if not has_triton():
            return "Triton and a GPU of compute capability 7.0 or more"
        language, names = "C", [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    else:
        language, names = "C++", [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    return None if any(map(shutil.which, names)) else f"a {language} compiler"


def compile_blocks(transformer: FluxTransformer2DModel) -> Callable[[], None]:
    """Compile the forwards of the blocks, each kind once, inside of all hooks.

    Hooks that stream weights or skip blocks come around them: they differ from block to block, and
    would be compiled anew for each.

    Args:
        transformer: Adapted, and not offloaded yet.

    Returns:
        What undoes it.

    Raises:
        ValueError: If the blocks have hooks of offloading already.
    """
    check_not_offloaded(transformer)
    keep_compiled()
    blocks = list_blocks(transformer)
    registries = [HookRegistry.check_if_exists_or_initialize(block) for block in blocks]
    for registry in registries:
        registry.register_hook(_CompiledForward(_VARIANTS * len(blocks)), _HOOK)

    def undo() -> None:
        for registry in registries:
            registry.remove_hook(_HOOK, recurse=False)

    return undo


def switch_compiled(transformer: FluxTransformer2DModel, is_on: bool) -> None:
    """Let forwards from here on go through compiled blocks or past them; both stay what they are.

    Each size is compiled for itself, which few forwards at it do not pay back.
    """
    for block in list_blocks(transformer):
        registry = getattr(block, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(_HOOK)
        if hook is not None:
            hook.is_compiled = is_on


def keep_compiled() -> None:
    """Let what is compiled outlive the process and the machine's temporary files.

    torch keeps it under /tmp, which containers and reboots empty. Here it is the user's cache
    folder, unless TORCHINDUCTOR_CACHE_DIR says otherwise; torch may have put its own there.
    """
    usual = default_cache_dir()
    if os.environ.get(_COMPILED_VARIABLE, usual) == usual:
        os.environ[_COMPILED_VARIABLE] = str(find_cache_dir("compiled"))


def list_blocks(transformer: FluxTransformer2DModel) -> list[Any]:
    """Return the double blocks, then the single ones."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def has_compiled_blocks(transformer: FluxTransformer2DModel) -> bool:
    """Tell whether blocks are compiled with all their hooks, as by diffusers' own method."""
    return any(block._compiled_call_impl is not None for block in list_blocks(transformer))


def check_not_offloaded(transformer: FluxTransformer2DModel) -> None:
    """Refuse blocks that something moves between devices, around which nothing more can be put.

    Raises:
        ValueError: If there are such blocks.
    """
    for block in list_blocks(transformer):
        registry = getattr(block, "_diffusers_hook", None)
        others = set() if registry is None else set(registry.hooks) - {_HOOK}
        if others or any(hasattr(module, "_hf_hook") for module in block.modules()):
            raise ValueError(
                "the blocks are already offloaded or hooked, but what speeds them up must be "
                "added before that; call urae.optimize first, then offload"
            )


def with_usual_strides(tensor: Tensor) -> Tensor:
    """Return the same numbers with the strides of a new tensor, copied only where they lie apart.

    The first stride of a batch of one may be any, as in the slices that single blocks return, and
    a block would be compiled for each; for what it is a view of, too.
    """
    usual = tensor.contiguous().view(tensor.shape)
    return usual if tensor.requires_grad else usual.detach()  # which no longer knows its origin


def fingerprint(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    """Tell a tensor from others that live, and from itself before a change in place."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype


class _CompiledForward(ModelHook):  # type: ignore[misc]
    """Puts a compiled forward in the place of a block's own."""

    def __init__(self, num_variants: int) -> None:
        super().__init__()
        # where LoRAs have another rank in each block, each is a variant of the one code: beyond
        # torch's limit of 8 blocks would run uncompiled, and only torch's log would say so
        limit = max(num_variants, torch._dynamo.config.recompile_limit)
        self.limited = torch._dynamo.config.patch(recompile_limit=limit)
        self.is_compiled = True

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.compiled = torch.compile(module.forward)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.is_compiled:
            return self.fn_ref.original_forward(*args, **kwargs)
        usual = {name: with_usual_strides(kwargs[name]) for name in _TOKENS if name in kwargs}
        with self.limited:
            return self.compiled(*args, **{**kwargs, **usual})
