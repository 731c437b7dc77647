"""In what order a run trains on its samples, and which rank on which.

Everything here is a pure function of the samples' sizes and of numbers, so a trainer resumes by its
place in the order alone, on any number of ranks.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from urae.features.dataset import Sample
from urae.geometry import num_image_tokens

Size = tuple[int, int]
"""Height and width in pixels."""
_LEVELS_PER_OCTAVE = 8  # batches within 9% of each other cost alike
_RUN_MULTIPLE = 8  # steps of 2, 4 or 8 batches fill a run without a rest
_MANY_BATCHES = 2048  # of fewer, runs of 64 would mix the sizes too little
_RUN_MULTIPLE_OF_MANY = 64


@dataclass(frozen=True)
class StepBatch:
    """Samples that go through the model together."""

    indices: tuple[int, ...]
    """Of samples, all of one size."""
    counters: tuple[int, ...]
    """One number for each, the same in no other place of the run: to seed its noise with."""


@dataclass(frozen=True)
class StepShare:
    """What one rank trains on in one step."""

    batches: tuple[StepBatch, ...]
    num_samples: int
    """Of the whole step, over all ranks: what the sum of their losses is divided by."""


class Order:
    """The endless order of a run's batches: epochs without a break, the same for any ranks."""

    def __init__(self, samples: Sequence[Sample], batch_size: int, *, seed: int) -> None:
        """Take note of the samples' sizes.

        Args:
            samples: What there is.
            batch_size: Samples in a batch, at most.
            seed: Of the run.
        """
        self._sizes = [(sample.height, sample.width) for sample in samples]
        self._batch_size = batch_size
        self._seed = seed
        self._epochs = {0: build_batches(self._sizes, batch_size, seed=seed, epoch=0)}
        self._length = len(self._epochs[0])

    def share(
        self, first: int, num_batches: int, *, rank: int = 0, num_ranks: int = 1
    ) -> StepShare:
        """Say what a rank trains on in the step that begins at a place of the order.

        The step takes the next `num_batches * num_ranks` batches. The dearest are dealt out first,
        then back and forth: at each turn the ranks' batches cost alike, and so do their sums.

        Args:
            first: Batches that the run, on all ranks, has trained on before.
            num_batches: Of each rank.
            rank: From 0.
            num_ranks: Ranks that have batches of their own.
        """
        step = [self._pick(first + index) for index in range(num_batches * num_ranks)]
        dealt = sorted(step, key=self._count_tokens, reverse=True)
        turns = [dealt[start : start + num_ranks] for start in range(0, len(dealt), num_ranks)]
        mine = (turn[-1 - rank if index % 2 else rank] for index, turn in enumerate(turns))
        return StepShare(tuple(mine), sum(len(batch.indices) for batch in step))

    def _pick(self, number: int) -> StepBatch:
        epoch, place = divmod(number, self._length)
        if epoch not in self._epochs:
            newest = self._epochs.popitem()
            batches = build_batches(self._sizes, self._batch_size, seed=self._seed, epoch=epoch)
            self._epochs = dict([newest, (epoch, batches)])  # a step may reach over two
        indices = self._epochs[epoch][place]
        begin = number * self._batch_size
        return StepBatch(indices, tuple(range(begin, begin + len(indices))))

    def _count_tokens(self, batch: StepBatch) -> int:
        return _count_tokens(self._sizes, batch.indices)


def build_batches(
    sizes: Sequence[Size], batch_size: int, *, seed: int, epoch: int
) -> tuple[tuple[int, ...], ...]:
    """Shuffle an epoch's samples into batches of one size each, like beside like.

    Every sample comes once. The last batch of a size may be smaller: nothing is repeated to fill
    it, nor dropped. Where batches differ in tokens, those that cost alike form runs, and the runs
    are shuffled: the ranks of a step take neighbours, and none waits for a dearer one. There are
    about as many runs as batches in a run.

    Args:
        sizes: Of the samples, (height, width) in pixels.
        batch_size: Samples in a batch, at most.
        seed: Of the run.
        epoch: From 0.

    Returns:
        Batches of indices into `sizes`; the same number in every epoch.
    """
    # A text seed goes through SHA-512: the same on every machine, and no two epochs alike
    shuffler = random.Random(f"urae {seed} {epoch}")
    by_size: defaultdict[Size, list[int]] = defaultdict(list)
    for index, size in enumerate(sizes):
        by_size[size].append(index)
    batches = []
    for indices in by_size.values():
        shuffler.shuffle(indices)
        starts = range(0, len(indices), batch_size)
        batches += [tuple(indices[start : start + batch_size]) for start in starts]
    shuffler.shuffle(batches)
    levels = {
        batch: round(_LEVELS_PER_OCTAVE * math.log2(_count_tokens(sizes, batch)))
        for batch in batches
    }
    if len(set(levels.values())) == 1:
        return tuple(batches)
    batches.sort(key=levels.__getitem__)  # stable: those alike stay shuffled
    multiple = _RUN_MULTIPLE_OF_MANY if len(batches) >= _MANY_BATCHES else _RUN_MULTIPLE
    length = multiple * math.ceil(math.sqrt(len(batches)) / multiple)
    runs = [batches[start : start + length] for start in range(0, len(batches), length)]
    shuffler.shuffle(runs)
    return tuple(batch for run in runs for batch in run)


def _count_tokens(sizes: Sequence[Size], batch: Sequence[int]) -> int:
    return len(batch) * num_image_tokens(*sizes[batch[0]])
