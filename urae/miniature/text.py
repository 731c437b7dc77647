"""The text stage: encoders that read captions, as FLUX's come trained on language.

Without it the base stage learns what a sentence says from pictures alone, and colours stray from
one object to another. Linear heads, thrown away afterwards, learn to tell from each T5 token what
its own object is and what the scene is like, and from CLIP's pooled embedding all of it.
"""

import logging
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from urae.miniature.grammar import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Description,
    parse_caption,
)
from urae.miniature.loop import StageRun, discard_state, run_loop
from urae.miniature.model import (
    HELD_OUT_SEED,
    TEXT_TOKENS,
    build_miniature,
    build_tokenizers,
    write_weights,
)
from urae.miniature.pool import tokenize, write_terse_caption
from urae.miniature.recipe import TextStage
from urae.miniature.world import sample_scene

logger = logging.getLogger(__name__)

TEXT_PARTS = ("text_encoder", "text_encoder_2")
PIPELINE_TOKENS = 512
"""Stock pipelines pad to these unless told otherwise."""

_OBJECT_OPTIONS = (SIZES, COLOURS, SHAPES, RELATIONS, RELATIONS)  # to the next, from the one before
_SCENE_OPTIONS = (range(1, MAX_OBJECTS + 1), TEXTURES, BACKGROUNDS, LIGHTS)
_OBJECT_CLASSES = [len(options) + 1 for options in _OBJECT_OPTIONS]  # the first: not said
_SCENE_CLASSES = [len(options) + 1 for options in _SCENE_OPTIONS]
_T5_CLASSES = _OBJECT_CLASSES + _SCENE_CLASSES
_CLIP_CLASSES = MAX_OBJECTS * _OBJECT_CLASSES + _SCENE_CLASSES
_NO_LABEL = -100
_LONG_EVERY, _LONG_SHARE = 20, 8  # of the steps, and of a batch, those padded as pipelines do


def train_text(config: TextStage, run: StageRun) -> bool:
    """Train the text encoders to read captions, and write them.

    Args:
        config: The stage.
        run: As of every stage.

    Returns:
        Whether it is done; if not, call again to go on.
    """
    parts = build_miniature("dev", guided=True, seed=run.seed)
    model = _Reader(parts["text_encoder"], parts["text_encoder_2"]).to(run.device)
    data = _Captions(range(config.num_captions), run.device)
    batch_size = run.share(config.batch_size)

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        long = step % _LONG_EVERY == 0
        size = max(1, batch_size // _LONG_SHARE) if long else batch_size
        chosen = torch.randint(len(data.t5_ids), (size,), generator=generator, device=run.device)
        t5_ids, t5_labels = data.t5_ids[chosen], data.t5_labels[chosen]
        if long:
            t5_ids = F.pad(t5_ids, (0, PIPELINE_TOKENS - TEXT_TOKENS))
        t5_logits, clip_logits = model(t5_ids, data.clip_ids[chosen])
        t5_logits = t5_logits[:, :TEXT_TOKENS]
        t5_loss = _cross_entropy(t5_logits, t5_labels, _T5_CLASSES)
        clip_loss = _cross_entropy(clip_logits, data.clip_labels[chosen], _CLIP_CLASSES)
        return t5_loss + clip_loss, {"T5": t5_loss, "CLIP": clip_loss}

    if not run_loop(model, compute_loss, config.loop, "text", run):
        return False
    if run.rank:
        return True
    record = _measure(model, config.num_held_out, run.device)
    logger.info("text done: %s", record)
    trained = {name: getattr(model, name) for name in TEXT_PARTS}
    write_weights(run.file("text"), trained, {**run.metadata, **record})
    discard_state("text", run)
    return True


class _Reader(nn.Module):
    """Both text encoders, each with a linear head for what it has read."""

    def __init__(self, text_encoder: Any, text_encoder_2: Any) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.clip_head = nn.Linear(text_encoder.config.hidden_size, sum(_CLIP_CLASSES))
        self.t5_head = nn.Linear(text_encoder_2.config.d_model, sum(_T5_CLASSES))

    def forward(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.text_encoder_2(t5_ids).last_hidden_state
        pooled = self.text_encoder(clip_ids).pooler_output
        return self.t5_head(tokens), self.clip_head(pooled)


class _Captions:
    """Captions as ids, with what they say as labels."""

    def __init__(self, seeds: range, device: torch.device) -> None:
        texts = [write_terse_caption(sample_scene(seed).description, seed) for seed in seeds]
        described = [parse_caption(text) for text in texts]
        t5_ids, clip_ids = tokenize(texts)
        self.t5_ids, self.clip_ids = t5_ids.to(device), clip_ids.to(device)
        self.t5_labels = label_tokens(t5_ids, described).to(device)
        self.clip_labels = torch.tensor([_label_all(each) for each in described], device=device)


def label_tokens(
    t5_ids: Int[Tensor, "n l"], described: list[Description]
) -> Int[Tensor, "n l labels"]:
    """Label each token with its object's size, colour, shape and relations, then with the scene.

    An object's words end with its shape; later ones have no object, padding has no label at all.
    """
    tokenizer = build_tokenizers()[1]
    shapes = torch.tensor(tokenizer.convert_tokens_to_ids([f"▁{shape}" for shape in SHAPES]))
    ends = torch.isin(t5_ids, shapes).long()
    belongs_to = (ends.cumsum(dim=1) - ends).clamp(max=MAX_OBJECTS)
    nothing = [_NO_LABEL] * len(_OBJECT_OPTIONS)
    table = torch.tensor([
        [
            row + _label_scene(each)
            for row in [*_label_objects(each), *[nothing] * (MAX_OBJECTS + 1)][: MAX_OBJECTS + 1]
        ]
        for each in described
    ])  # fmt: skip
    labels = table[torch.arange(len(described))[:, None], belongs_to]
    labels[t5_ids == tokenizer.pad_token_id] = _NO_LABEL
    return labels


def _label_objects(described: Description) -> list[list[int]]:
    after = (*described.relations, None)
    before = (None, *described.relations)
    return [
        _find_labels((each.size, each.colour, each.shape, following, leading), _OBJECT_OPTIONS)
        for each, following, leading in zip(described.objects, after, before, strict=True)
    ]


def _label_scene(described: Description) -> list[int]:
    said = (len(described.objects), described.texture, described.background, described.light)
    return _find_labels(said, _SCENE_OPTIONS)


def _label_all(described: Description) -> list[int]:
    rows = _label_objects(described)
    rows += [[_NO_LABEL] * len(_OBJECT_OPTIONS)] * (MAX_OBJECTS - len(rows))
    return [label for row in rows for label in row] + _label_scene(described)


def _find_labels(said: tuple[Any, ...], all_options: tuple[Any, ...]) -> list[int]:
    return [
        0 if word is None else options.index(word) + 1
        for word, options in zip(said, all_options, strict=True)
    ]


def _cross_entropy(logits: Tensor, labels: Tensor, classes: list[int]) -> Tensor:
    losses = [
        F.cross_entropy(each.flatten(0, -2), labels[..., number].flatten(), ignore_index=_NO_LABEL)
        for number, each in enumerate(torch.split(logits, classes, dim=-1))
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def _measure(model: Any, count: int, device: torch.device) -> dict[str, str]:
    """Return the share of labels that held-out captions are read rightly for."""
    data = _Captions(range(HELD_OUT_SEED, HELD_OUT_SEED + count), device)
    t5_logits, clip_logits = model(data.t5_ids, data.clip_ids)
    shares = {}
    for name, logits, labels, classes in (
        ("t5_accuracy", t5_logits, data.t5_labels, _T5_CLASSES),
        ("clip_accuracy", clip_logits, data.clip_labels, _CLIP_CLASSES),
    ):
        found = torch.stack([x.argmax(-1) for x in torch.split(logits, classes, dim=-1)], dim=-1)
        said = labels != _NO_LABEL
        shares[name] = f"{(found == labels)[said].double().mean().item():.4f}"
    return shares
