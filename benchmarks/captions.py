"""How many of the captions that scores are told by stand word for word in the base's training.

    python benchmarks/captions.py

The scenes are others; a caption says little of a scene with one object. Needs no GPU, some minutes.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from urae.miniature.pool import write_terse_caption
from urae.miniature.score import held_out_scenes
from urae.miniature.world import caption, sample_scene


def main() -> None:
    """Print the share by number of objects."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=196_608, help="that the base trained on")
    parser.add_argument("--captions", type=int, default=500, help="that are held out")
    parser.add_argument("--first", type=int, default=0, help="number of the first of these")
    arguments = parser.parse_args()
    seen = {
        write_terse_caption(sample_scene(seed).description, seed)
        for seed in range(arguments.scenes)
    }
    scenes = held_out_scenes(arguments.captions, arguments.first)
    total = Counter(len(scene.objects) for scene in scenes)
    known = Counter(len(scene.objects) for scene in scenes if caption(scene) in seen)
    for number, count in sorted(total.items()):
        print(f"{number} objects: {known[number]} of {count}")
    print(f"all: {known.total() / total.total():.1%}")


if __name__ == "__main__":
    main()
