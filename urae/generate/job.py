"""The generation job: prompts in, PNG files out."""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from traceback import clear_frames
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL import Image
from torch.distributed import ProcessGroup

from urae import __version__
from urae.adapters.adapt import adapt, path_of
from urae.adapters.files import read_adapter, read_lora
from urae.backbones.attention import active_backend
from urae.backbones.context_parallel import build_mesh, check_backend_can_share, context_parallel
from urae.backbones.devices import pick_device, pick_dtype
from urae.backbones.flux import (
    build_meta_models,
    count_tokens,
    encode_prompts,
    fetch_model,
    find_local,
    load_pipeline,
)
from urae.backbones.free_memory import free_bytes, is_out_of_memory, name_shortage, release_memory
from urae.backbones.ranks import Ranks, explain_lost_rank, join_ranks
from urae.choices import Tier
from urae.generate.chunks import token_chunks
from urae.generate.config import GenerateConfig
from urae.generate.estimate import QUANTIZED, Request, count_bytes, stream_text
from urae.generate.inputs import Sampling, check_base, find_excluded, find_missing
from urae.generate.memory import (
    find_room,
    leave_quantized_out,
    list_tiers,
    name_held,
    place,
    stream_layers,
)
from urae.generate.optimize import apply_parts, check_machine, choose_parts, find_unfit
from urae.generate.parts import EXACT, Part, find_bits, leave_compiled_out
from urae.generate.picture import Picture, list_pictures, save_picture
from urae.generate.quantize import build_quantization, check_quantization
from urae.generate.sample import PromptEmbeds, decode, sample
from urae.generate.speed import can_compile, pays_to_compile
from urae.generate.spread import Spread, choose_spread, find_degrees
from urae.geometry import num_image_tokens
from urae.resolution import ResolutionPolicy, find_policy, read_base_policy

logger = logging.getLogger(__name__)

# while weights load, transformers and peft change how every new module of the process is made
_LOADING = Lock()

_AGAIN = (
    "start all of them again, with --resume if there is a --seed and no --overwrite, otherwise "
    "with --overwrite"
)


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    picture: int
    """From 1."""
    num_pictures: int
    step: int
    """Denoising steps done on this picture."""
    num_steps: int


def generate(
    config: GenerateConfig, *, on_progress: Callable[[Progress], None] | None = None
) -> list[Path]:
    """Generate pictures and write them as PNG files with their whole recipe inside.

    In processes that torchrun has started, each with a GPU of its own, the pictures are spread over
    them (`urae.generate.spread`), with the same names and seeds; all of them call this alike.

    Args:
        config: What to generate.
        on_progress: Called after each denoising step, by the first process only.

    Returns:
        The files, in order, those of all processes.

    Raises:
        ValueError: If an adapter is damaged or for another base, the model has no such guidance or
            text length, or the pictures leave GPUs idle; before weights load.
        FileNotFoundError: If the model, an adapter or a LoRA is missing.
        FileExistsError: If a picture of that name exists and `overwrite` is off, or the folder
            cannot be one.
        PermissionError: If the folder cannot be written.
        ModuleNotFoundError: If the library of a quantised tier is not installed.
        MemoryError: If the device's or the host's memory does not suffice; says which `memory` to
            try. With `auto` on one GPU that is after one more try with less.
        ConnectionError: If another process is lost.
    """
    with explain_lost_rank(_AGAIN), join_ranks(pick_device()) as ranks:
        if ranks.device.type == "cuda":  # where what is free decides the tier
            release_memory(ranks.device)  # of an earlier job of this process
        return _generate(config, ranks, on_progress if ranks.rank == 0 else None)


def _generate(
    config: GenerateConfig, ranks: Ranks, on_progress: Callable[[Progress], None] | None
) -> list[Path]:
    drawn = random.SystemRandom().randrange(2**32)
    seed = ranks.agree(drawn) if config.seed is None else config.seed
    whole = list_pictures(config.prompts, config.num_images, seed, config.output_dir)
    paths, device = [picture.path for picture in whole], ranks.device
    pictures = find_missing(config, whole)
    if config.resume:
        pictures = ranks.agree(pictures)
    if not pictures:
        return paths
    check_machine(config.parts, device)
    if config.memory != "auto":
        check_quantization(config.memory, device)
    adapters = [read_adapter(source) for source in config.adapters]
    if find_local(config.model) is None:  # what does not fit is said before gigabytes come
        transformer = build_meta_models(config.model)["transformer"]
        check_base(config, adapters, transformer, Path(config.model))
    model_path = fetch_model(config.model)
    meta = build_meta_models(model_path)
    adapter_bytes, sampling = check_base(config, adapters, meta["transformer"], model_path)
    is_named = "compile" in config.parts and can_compile(device)
    pays = is_named or pays_to_compile(
        device, config.height, config.width, sampling.steps, len(pictures) / ranks.count
    )
    unfit = find_unfit(
        config.speed,
        meta["transformer"],
        device,
        compiled=pays,
        known=find_excluded(config, adapters, sampling, model_path, len(pictures) < ranks.count),
        memory=config.memory,
    )
    parts = choose_parts(config.speed, config.parts, compiled=pays, unfit=unfit)
    spread = Spread(len(pictures), 1)
    if ranks.count > 1:
        degrees = find_degrees(config, adapters, sampling, parts, meta["transformer"], model_path)
        spread = choose_spread(len(pictures), ranks.count, degrees)
    del adapters  # as large as what the pipeline reads itself
    if spread.num_shared:
        check_backend_can_share()
    request = Request(
        config.height, config.width, sampling.max_sequence_length, adapter_bytes,
        _is_compiled(parts), spread.least_degree, bits=find_bits(parts),
    )  # fmt: skip
    tiers = _list_tiers(config, model_path, parts, device)
    tier = find_room(meta, request, tiers, ranks).choose(config.memory)
    check_quantization(tier, device)
    job = _Job(config, pictures, sampling, parts, ranks, spread, on_progress)
    for may_retry in (config.memory == "auto" and ranks.count == 1, False):
        try:
            job.run(tier)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = f"{name_held(tier, device)} ({name_shortage(error)})"
            clear_frames(error.__traceback__)  # which keep what the failed try held
            release_memory(device)
            # of this rank alone: the others may wait for something else
            leaner = find_room(meta, request, tiers, Ranks(device)).find_fallback(tier)
            if not may_retry or leaner is None:
                remedy = "a smaller --size" if leaner is None else f"--memory {leaner}"
                raise MemoryError(
                    f"not enough memory for {config.width} x {config.height} pixels with "
                    f"{failed}; try {remedy}"
                ) from error
        logger.warning(
            "ran out of memory with %s: trying once more with --memory %s", failed, leaner
        )
        tier = leaner
    return paths


def _list_tiers(
    config: GenerateConfig, model_path: Path, parts: Sequence[Part], device: torch.device
) -> Sequence[Tier]:
    """List the tiers to choose from: with some parts that are named no quantised one."""
    tiers: Sequence[Tier] = list_tiers(config.memory, model_path)
    if (bits := find_bits([part for part in parts if not part.is_preset])) is not None:
        check_quantization(bits, device, asked="--part")
        tiers = leave_quantized_out(tiers, config.memory, bits)
    if "compile" in config.parts:
        tiers = [tier for tier in tiers if tier not in QUANTIZED]
    return tiers


@dataclass(frozen=True)
class _Job:
    """What is to be made by this rank, and how; a second try goes on where the first has ended."""

    config: GenerateConfig
    pictures: Sequence[Picture]
    """Of all ranks."""
    sampling: Sampling
    parts: Sequence[Part]
    ranks: Ranks
    spread: Spread
    on_progress: Callable[[Progress], None] | None
    written: list[Path] = field(default_factory=list)

    def run(self, tier: Tier) -> None:
        """Load the model on a tier, and make this rank's pictures that are not written yet."""
        device, rank = self.ranks.device, self.ranks.rank
        mesh = build_mesh(self.spread.degree, device) if self.spread.num_shared else None
        shared, whole = self.spread.list_shared(rank), self.spread.list_whole(rank)
        todo = [n for n in (*shared, *whole) if self.pictures[n].path not in self.written]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        parts = self.list_parts(tier)
        pipe = self.load(tier)
        prompts = tuple(self.pictures[number].prompt for number in todo)
        positions = find_policy(pipe.transformer)  # which parts may change for now
        policy = None if positions is None else positions.policy
        embeds = _encode_prompts(pipe, prompts, self.sampling.max_sequence_length, device, tier)
        # compiling fuses an MLP by itself
        chunks = nullcontext() if _is_compiled(parts) else token_chunks(pipe.transformer)
        with chunks, ExitStack() as sharing:
            with _LOADING:  # quantising makes parameters too
                apply_parts(pipe, parts, device, keep_weights=False)
            place(pipe, tier, device)
            group = None
            if mesh is not None:
                sharing.enter_context(context_parallel(pipe.transformer, mesh))
                group = mesh.get_group("ulysses")
            for number in todo:
                if number not in shared:  # they come first
                    sharing.close()
                    group = None
                image = self.make(pipe, embeds, number, group)
                if group is not None and group.rank() > 0:
                    continue  # one of the group writes it
                path = self.pictures[number].path
                num_gpus = 1 if group is None else group.size()
                save_picture(path, image, self.describe(policy, number, tier, num_gpus))
                self.written.append(path)
        self.ranks.wait()

    def list_parts(self, tier: Tier) -> list[Part]:
        """List what makes it faster on a tier: quantised blocks are not compiled."""
        return leave_compiled_out(self.parts) if tier in QUANTIZED else [*self.parts]

    def load(self, tier: Tier) -> FluxPipeline:
        """Load the model with its adapters, on the CPU; one thread at a time."""
        with _LOADING:
            return self._load(tier)

    def _load(self, tier: Tier) -> FluxPipeline:
        config = self.config
        inexact = [str(part) for part in self.list_parts(tier) if part.name not in EXACT]
        if tier in QUANTIZED:
            inexact.append(f"weights in {tier}")
            reason = f"blocks are not compiled with --memory {tier}"
            for part in {*self.parts} - {*self.list_parts(tier)}:
                if part.name != "compile":
                    logger.warning("speed %s: %s is left out: %s", config.speed, part.name, reason)
        if inexact:
            logger.warning("%s: the pictures are approximations", ", ".join(inexact))
        dtype = pick_dtype(self.ranks.device)
        quantization = build_quantization(tier, dtype)
        pipe = load_pipeline(config.model, dtype=dtype, quantization=quantization)
        pipe.set_progress_bar_config(disable=True)
        if config.adapters or config.policy or _is_beyond_native(pipe, config, self.sampling):
            adapt(pipe, config.adapters, policy=config.policy)
        _load_loras(pipe, config.loras)
        return pipe

    def make(
        self,
        pipe: FluxPipeline,
        embeds: Mapping[str, PromptEmbeds],
        number: int,
        group: ProcessGroup | None,
    ) -> Image.Image:
        """Make a picture, alone or with the others of a group."""
        picture, height, width = self.pictures[number], self.config.height, self.config.width

        def report(step: int) -> None:
            if self.on_progress is not None:
                self.on_progress(
                    Progress(number + 1, len(self.pictures), step, self.sampling.steps)
                )

        text = PromptEmbeds(*(each.to(self.ranks.device) for each in embeds[picture.prompt]))
        tokens = sample(pipe, text, picture.seed, height, width, self.sampling, report)
        return decode(pipe, tokens, height, width, self.ranks.device, group)

    def describe(
        self, policy: ResolutionPolicy | None, number: int, tier: Tier, num_gpus: int
    ) -> dict[str, Any]:
        """Say how a picture was made, for its PNG."""
        config, parts = self.config, self.list_parts(tier)
        libraries = ("torch", "diffusers", "peft", "transformers")
        return {
            "prompt": self.pictures[number].prompt,
            "seed": self.pictures[number].seed,
            "width": config.width,
            "height": config.height,
            "model": config.model,
            "adapters": list(config.adapters),
            "loras": [list(lora) for lora in config.loras],
            "policy": None if policy is None else asdict(policy),
            **asdict(self.sampling),
            "versions": {"urae": __version__, **{name: version(name) for name in libraries}},
            "memory": tier,
            "compiled": _is_compiled(parts),
            "speed": config.speed,
            "approximations": config.approximations,
            "parts": [str(part) for part in parts],
            "attention": active_backend().value,
            "gpus": num_gpus,
        }


def _is_compiled(parts: Sequence[Part]) -> bool:
    return any(part.name == "compile" for part in parts)


def _is_beyond_native(pipe: FluxPipeline, config: GenerateConfig, sampling: Sampling) -> bool:
    """Tell whether a base without adapters needs the policy: at its own size it is left alone."""
    native = read_base_policy(path_of(pipe)).native_sequence_length
    image_tokens = num_image_tokens(config.height, config.width)
    return image_tokens + sampling.max_sequence_length > native


def _load_loras(pipe: FluxPipeline, loras: tuple[tuple[str, float], ...]) -> None:
    if not loras:
        return
    weights = dict.fromkeys(pipe.get_active_adapters(), 1.0)
    for index, (source, weight) in enumerate(loras):
        lora, name = read_lora(source), f"lora_{index}"
        if isinstance(lora, Path):
            pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name=name)
        else:
            pipe.load_lora_weights(lora, adapter_name=name)
        weights[name] = weight
    pipe.set_adapters(list(weights), list(weights.values()))


def _encode_prompts(
    pipe: FluxPipeline,
    prompts: tuple[str, ...],
    max_sequence_length: int,
    device: torch.device,
    tier: Tier,
) -> dict[str, PromptEmbeds]:
    """Encode each prompt, and let the text encoders go: sampling needs their room."""
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    if stream_text(tier, sum(map(count_bytes, encoders)), free_bytes(device)):
        logger.info("the large text encoder is streamed, the small one runs on the CPU")
        stream_layers(pipe.text_encoder_2.encoder, device)
    else:
        for encoder in encoders:
            encoder.to(device)
    for prompt in dict.fromkeys(prompts):
        if (num_tokens := count_tokens(pipe, prompt)) > max_sequence_length:
            logger.warning(
                "prompt '%s' has %d tokens, but only the first %d are used; shorten it, or raise "
                "--max-sequence-length if the model allows more",
                f"{prompt[:40]}...", num_tokens, max_sequence_length,
            )  # fmt: skip
    embeds = {
        prompt: PromptEmbeds(
            *(
                tensor.cpu()  # those of all prompts would take what no tier counts
                for tensor in encode_prompts(
                    pipe, [prompt], max_sequence_length=max_sequence_length
                )
            )
        )
        for prompt in dict.fromkeys(prompts)
    }
    pipe.register_modules(text_encoder=None, text_encoder_2=None)
    release_memory(device)
    return embeds
