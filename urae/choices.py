"""The names that options and configurations choose from; the command line imports them quickly."""

from typing import Literal

Tier = Literal["resident", "streamed", "offload", "8bit", "4bit"]
"""Where a model's weights live: on the GPU, on the host and copied to it as they are needed (in
generating, `offload` has a whole model at a time on the GPU; in training, it has activations on the
host), or on the GPU in fewer bits."""
Memory = Literal["auto", Tier]
"""A tier, or the first that fits."""
Speed = Literal["exact", "fast", "turbo"]
Bits = Literal["fp8", "8bit", "4bit"]
"""Eight-bit floats for weights and activations, a scale a row; int8 weights; nf4 weights."""
PartName = Literal[
    Bits,
    "local-attention",
    "attention-backend",
    "joined-adapters",
    "merged-adapters",
    "constants",
    "progressive",
    "compile",
    "striped-vae",
    "tiled-vae",
    "first-block-cache",
    "mag-cache",
    "taylorseer-cache",
]
"""What can make a pipeline faster, in the order in which it is put in place."""
LoraFormat = Literal["diffusers", "kohya"]
MiniatureStage = Literal[
    "vae",
    "text",
    "base",
    "refined",
    "dev",
    "schnell",
    "teacher_256",
    "teacher_512",
    "teacher_1024",
]
"""Of the miniature's training, in the order in which they need one another."""
Question = Literal["a", "b", "c", "d", "e", "f"]
"""Of the study."""
