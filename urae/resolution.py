"""The resolution policy: how positions, attention and the schedule follow the picture's size.

One object serves training, previews, generation and the metadata of adapter files. It acts
through the position module that stock FLUX already has, so no attention processor, transformer
or pipeline is replaced: cos and sin scaled by a number scale the logits by its square. Local
attention acts through hooks of the transformer and the mask that stock processors take.
"""

import inspect
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from urae.geometry import widen_ids
from urae.local_attention import SMALLEST_SIDE, LocalForward

BASE_POLICY_FILE = "resolution_policy.json"


@dataclass(frozen=True)
class ResolutionPolicy:
    """How a FLUX model is asked for more pixels than it was trained on.

    From "Ultra-Resolution Adaptation with Ease" (arXiv:2503.16322, section 3 and appendix).
    """

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    ntk_factor: float | Literal["auto"] = 10.0
    """RoPE base multiplier on all three axes, > 0; 1 leaves positions as they are, "auto" up to
    native size too, and slows them as much as a larger picture is enlarged."""
    proportional_attention: bool = True
    """Scale attention logits by sqrt(log L / log L0) for L text and image tokens."""
    native_sequence_length: int = 4608
    """L0: text and image tokens at the base's native size (FLUX.1: 512 + 64 x 64)."""
    time_shift: float | Literal["dynamic"] | None = None
    """Sampling schedule: None is the scheduler's own static shift, a number > 0 replaces it,
    "dynamic" is the resolution-dependent shift of stock diffusers. Training has its own."""
    attention: Literal["full", "local"] = "full"
    """Where a picture is larger than native: "local" lets image tokens see their neighbourhood, the
    text and a coarse view of the rest, an approximation with an eighth of the keys at 4K."""

    def __post_init__(self) -> None:
        factor = self.ntk_factor
        if not (factor == "auto" if isinstance(factor, str) else 0 < factor < math.inf):
            raise ValueError(
                f"ntk_factor {factor!r} must be a positive number or 'auto'; 10 is usual"
            )
        if self.native_sequence_length < 2:
            raise ValueError(
                f"native_sequence_length {self.native_sequence_length} must be at least 2 tokens; "
                "FLUX.1 has 4608"
            )
        shift = self.time_shift
        if isinstance(shift, str) and shift != "dynamic":
            raise ValueError(f"time_shift {shift!r} must be a positive number, 'dynamic' or None")
        if isinstance(shift, int | float) and not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"time_shift {shift} must be a positive number, 'dynamic' or None")
        if self.attention not in ("full", "local"):
            raise ValueError(f"attention {self.attention!r} must be 'full' or 'local'")
        if factor == "auto" and not self.native_side:
            raise ValueError(
                f"native_sequence_length {self.native_sequence_length} is too short for ntk_factor "
                "'auto', which needs 64 tokens or more; give a number"
            )
        if self.attention == "local" and self.native_side < SMALLEST_SIDE:
            raise ValueError(
                f"native_sequence_length {self.native_sequence_length} is too short for local "
                f"attention, which needs {SMALLEST_SIDE**2} tokens or more"
            )

    @property
    def native_side(self) -> int:
        """Image tokens along a side of the native square: sqrt(L0), down to a multiple of 8.

        What is left of L0 is text: 64 of FLUX.1's sqrt(512 + 64 x 64) = 67.9.
        """
        return math.isqrt(self.native_sequence_length) // 8 * 8

    def rope_factor(self, num_image_tokens: int, theta: float) -> float:
        """Return the multiplier of the RoPE base for a picture.

        Frequencies are theta^-x, x from 0 to 1. A base multiplied by k has them slower by k^x. The
        slowest to turn by half over a native side, pi / side, tell one end of a native picture
        from the other; "auto" slows just these by the enlargement, so that they do so again, and
        leaves the fast ones, which tell neighbours apart, nearly as they are.

        Args:
            num_image_tokens: Of one picture, over all ranks.
            theta: The stock base.
        """
        if self.ntk_factor != "auto":
            return self.ntk_factor
        enlargement = max(1.0, math.sqrt(num_image_tokens) / self.native_side)
        x = math.log(self.native_side / math.pi) / math.log(theta)
        return float(enlargement ** (1 / x))

    def attention_scale(self, sequence_length: float) -> float:
        """Return the factor on the attention logits, 1 at L0.

        Proportional attention has softmax scale sqrt(log_L0(L) / d) in place of 1 / sqrt(d)
        (arXiv:2306.08645, section 3.2, as URAE uses it).

        Args:
            sequence_length: L, all text and image tokens, over all ranks; with local attention
                the keys that an image token sees.
        """
        if not self.proportional_attention:
            return 1.0
        return math.sqrt(math.log(sequence_length) / math.log(self.native_sequence_length))

    def to_json(self) -> str:
        """Write the policy as JSON, for file metadata."""
        fields = asdict(self)
        if self.attention == "full":
            del fields["attention"]  # readers older than this field refuse what they do not know
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str, origin: str) -> Self:
        """Read what `to_json` wrote.

        Args:
            text: A JSON object of the policy's fields.
            origin: Where the text was found, for the error.

        Raises:
            ValueError: If the text is not a policy.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "policy"
            raise ValueError(f"{origin}: resolution policy: {where}: {first['msg']}") from error


def read_base_policy(model_path: str | os.PathLike[str] | None) -> ResolutionPolicy:
    """Return the policy that a base model's folder carries, else FLUX.1's.

    Args:
        model_path: Folder of the pipeline, or anything that is no folder (a hub id).

    Raises:
        ValueError: If the folder's `resolution_policy.json` is not a policy.
    """
    if model_path is None or not (path := Path(model_path) / BASE_POLICY_FILE).is_file():
        return ResolutionPolicy()
    return ResolutionPolicy.from_json(path.read_text(), str(path))


@dataclass(frozen=True)
class Adaptation:
    """What a transformer was adapted with."""

    policy: ResolutionPolicy
    """Of `urae.adapt`; parts may change the one that is followed."""
    names: tuple[str, ...] = ()
    """Of adapters that the policy belongs with; a forward without them warns."""
    names_4k: tuple[str, ...] = ()
    """Of them, those for the largest pictures."""
    sources: tuple[str, ...] = ()
    is_full_beneath: bool = False
    """Whether what the 4K ones lie over learnt with full attention."""

    @property
    def is_only_4k(self) -> bool:
        """Tell whether its adapters are for the largest pictures, without one for half of them."""
        return bool(self.names) and len(self.names_4k) == len(self.names)


class ResolutionPositions(nn.Module):
    """A FLUX position module that follows a resolution policy.

    Takes the place of a stock `FluxPosEmbed` and gives the same kind of cos and sin.

    Args:
        stock: The module that it stands for.
        policy: What to follow.
        local: What makes attention local, if anything does.
        adapted: What the policy belongs with.
    """

    def __init__(
        self, stock: Any, policy: ResolutionPolicy, local: LocalForward | None, adapted: Adaptation
    ) -> None:
        super().__init__()
        self.stock = stock
        self.policy = policy
        self.rope = type(stock)(theta=stock.theta, axes_dim=stock.axes_dim)
        self.adapted = adapted
        self.is_resting = False  # whether some adapters are left out for now on purpose
        self.local = local
        self.hooks: list[RemovableHandle] = []
        self.sequence_length = self.num_image_tokens = 0  # of the forward at hand
        self._counted_ids: Tensor | None = None
        self._num_own_tokens = 0
        self.num_local_keys: float | None = None  # that an image token sees, if not all
        self._warned_about: tuple[str, ...] = ()

    def rest(self, is_resting: bool, *, is_fused: bool = False) -> None:
        """Tell whether adapters are left out for now; what is left attends as it has learnt to.

        Args:
            is_resting: Whether they are.
            is_fused: Whether they act all the same, being fused into the base.
        """
        self.is_resting = is_resting
        learnt = self.adapted.is_full_beneath and self.adapted.policy.attention == "local"
        if learnt and self.local is not None:
            self.local.is_on = is_fused or not is_resting

    def forward(self, ids: Float[Tensor, "tokens axes"]) -> tuple[Tensor, Tensor]:
        """Return cos and sin (tokens x head dim, float32) of these positions."""
        theta = self.stock.theta
        self.rope.theta = theta * self.policy.rope_factor(self.num_image_tokens, theta)
        cos, sin = self.rope(ids)
        # a ControlNet may add a token after the hook has counted, context parallelism hands over
        # this rank's tokens only: the longer of the two counts is the sequence of the attention
        length = max(self.sequence_length, ids.shape[0])
        scale = math.sqrt(self.policy.attention_scale(self.num_local_keys or length))
        return cos * scale, sin * scale

    def prepare_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Widen position ids to float32, count the tokens, go local (a forward pre-hook).

        It runs before context parallelism splits the inputs, so the count is global.
        """
        inputs = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
        image_ids, text_ids = inputs.arguments.get("img_ids"), inputs.arguments.get("txt_ids")
        if image_ids is not None and text_ids is not None:
            self.num_image_tokens = self._count_tokens(image_ids)
            self.sequence_length = image_ids.shape[-2] + text_ids.shape[-2]
            inputs.arguments["img_ids"] = widen_ids(image_ids)
            inputs.arguments["txt_ids"] = text_ids.float()
            if self.local is not None:
                self.num_local_keys = self.local.enter(module, inputs.arguments, image_ids)
        if not torch.compiler.is_compiling():
            self._warn_of_inactive(module)
        # by keyword, where stock decorators of the forward look for what is theirs
        arguments = dict(inputs.arguments)
        del arguments["self"]
        return (), arguments

    def _count_tokens(self, image_ids: Float[Tensor, "*b tokens 3"]) -> int:
        """Count the picture's tokens; those of references (Kontext's) are of no larger picture.

        Only "auto" positions ask. It waits for the device once a picture: pipelines give the same
        tensor in each step. In training, which gives others and has no references, it does not.
        """
        asked = self.policy.ntk_factor == "auto" and not torch.is_grad_enabled()
        if not asked or torch.compiler.is_compiling():
            return image_ids.shape[-2]
        if image_ids is not self._counted_ids:
            self._counted_ids = image_ids
            own = image_ids if image_ids.ndim == 2 else image_ids[0]
            self._num_own_tokens = int((own[:, 0] == 0).sum())
        return self._num_own_tokens

    def _warn_of_inactive(self, module: Any) -> None:
        names = self.adapted.names
        if not names or self.is_resting:
            return
        active = _active_adapters(module)
        inactive = tuple(name for name in names if name not in active)
        gone = [name for name in inactive if name not in peft_configs(module)]
        if gone and inactive != self._warned_about:
            warnings.warn(
                f"the resolution policy is on but its adapter {', '.join(gone)} was removed; call "
                "urae.adapt again, or urae.restore(pipe) to leave ultra-resolution",
                stacklevel=2,
            )
        elif inactive and inactive != self._warned_about:
            warnings.warn(
                f"the resolution policy is on but its adapter {', '.join(inactive)} is not active "
                "(loading another LoRA deactivates earlier ones, and disable_lora deactivates "
                "all); call "
                f"pipe.set_adapters({[*dict.fromkeys([*active, *names])]}), "
                "pipe.enable_lora(), or urae.restore(pipe) to leave ultra-resolution",
                stacklevel=2,
            )
        self._warned_about = inactive


def peft_configs(module: nn.Module) -> dict[str, Any]:
    """Return peft's settings by adapter; a model without adapters has no place for them."""
    configs: dict[str, Any] | None = getattr(module, "peft_config", None)
    return configs or {}


def _active_adapters(module: Any) -> list[str]:
    if not peft_configs(module):
        return []
    switches = (getattr(layer, "disable_adapters", None) for layer in module.modules())
    if next((switch for switch in switches if isinstance(switch, bool)), False):
        return []  # disable_lora() was called
    active: list[str] = module.active_adapters()
    return active


def apply_policy(
    module: nn.Module, policy: ResolutionPolicy, adapted: Adaptation | None = None
) -> ResolutionPositions:
    """Make a stock FLUX transformer or ControlNet follow a policy, in place of any earlier one.

    Args:
        module: Has a stock position module as `pos_embed`.
        policy: What to follow.
        adapted: What the policy belongs with; None for no adapters.
    """
    remove_policy(module)
    # a ControlNet keeps full attention: the stock one hands no mask to its blocks
    local = None
    if policy.attention == "local" and isinstance(module, FluxTransformer2DModel):
        local = LocalForward(policy.native_side)
    positions = ResolutionPositions(module.pos_embed, policy, local, adapted or Adaptation(policy))
    prepare = positions.prepare_forward
    positions.hooks = [module.register_forward_pre_hook(prepare, with_kwargs=True)]
    if local is not None:
        positions.hooks.append(module.register_forward_hook(local.leave))
    module.pos_embed = positions
    return positions


def remove_policy(module: nn.Module) -> None:
    """Give a module its stock position module back; nothing happens if it has it."""
    if isinstance(positions := module.pos_embed, ResolutionPositions):
        for hook in positions.hooks:
            hook.remove()
        if positions.local is not None:
            positions.local.remove()
        module.pos_embed = positions.stock


def change_policy(module: nn.Module, policy: ResolutionPolicy) -> ResolutionPositions:
    """Let an adapted transformer follow another policy; its adapters stay what they are."""
    before = find_policy(module)
    assert before is not None
    return apply_policy(module, policy, before.adapted)


def find_policy(module: nn.Module) -> ResolutionPositions | None:
    """Return the position module of an adapted transformer or ControlNet, None for a stock one."""
    positions = module.pos_embed
    return positions if isinstance(positions, ResolutionPositions) else None


def shift_scheduler(scheduler: Any, policy: ResolutionPolicy) -> Any:
    """Make a scheduler of the same class and settings with the policy's time shift.

    Args:
        scheduler: A flow-matching scheduler of diffusers, left as it is.
        policy: Its `time_shift` decides.

    Raises:
        ValueError: If the scheduler has no time shift to set.
    """
    config: Mapping[str, Any] = scheduler.config
    missing = {"shift", "use_dynamic_shifting"} - set(config)
    if missing:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has no {', '.join(sorted(missing))}; the "
            "resolution policy needs a flow-matching one, such as FlowMatchEulerDiscreteScheduler"
        )
    if policy.time_shift == "dynamic":
        changes: dict[str, Any] = {"use_dynamic_shifting": True}
    elif policy.time_shift is None:
        changes = {"use_dynamic_shifting": False}
    else:
        changes = {"use_dynamic_shifting": False, "shift": float(policy.time_shift)}
    return type(scheduler).from_config(config, **changes)
