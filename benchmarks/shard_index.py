"""Time what a run reads of its shards before it begins: the index alone, of made-up samples.

    python benchmarks/shard_index.py --samples 300000

Needs no GPU and no features: the shards themselves are empty files of the right size.
"""

import argparse
import resource
import sys
import tempfile
import time
import zlib
from pathlib import Path

from urae.features.byte_cache import ByteCache
from urae.features.shard_folder import ShardFolder
from urae.features.shards import (
    FORMAT_VERSION,
    INDEX_FORM,
    INDEX_NAME,
    SHARD_INDEX_FORM,
    Entry,
    Index,
    IndexFile,
    SampleEntry,
    ShardIndex,
    encode_record,
    read_shards,
)
from urae.features.store import Header

SAMPLES_PER_SHARD = 1000
NUM_BYTES = 100_000  # of a feature file
HEADERS = [
    Header(
        {"resolution": "2048", "vae": "0" * 64}, {"mean": (16, 256, 256), "std": (16, 256, 256)}
    ),
    Header(
        {"text_encoders": "0" * 64},
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
    ),
]


def write_index(folder: Path, num_samples: int) -> int:
    """Write the index of samples with latents and two captions each.

    Returns:
        Its size in bytes.
    """
    files, size = [], 0
    for first in range(0, num_samples, SAMPLES_PER_SHARD):
        numbers = range(first, min(first + SAMPLES_PER_SHARD, num_samples))
        samples = [
            SampleEntry(f"{number:08d}", 2048, 2048, make_entry(3 * number, 0), {
                "prompt": make_entry(3 * number + 1, 1),
                "generated_caption": make_entry(3 * number + 2, 1),
            })
            for number in numbers
        ]  # fmt: skip
        num_bytes = NUM_BYTES * 3 * len(samples)
        shard = ShardIndex(num_bytes, "0" * 64, HEADERS, samples)
        data = encode_record(SHARD_INDEX_FORM, shard)
        name = f"features-{first // SAMPLES_PER_SHARD:06d}"
        (folder / f"{name}.json").write_bytes(data)
        with (folder / f"{name}.tar").open("wb") as tar:
            tar.truncate(num_bytes)
        files.append(IndexFile(name, len(data), zlib.crc32(data)))
        size += len(data)
    data = encode_record(INDEX_FORM, Index(FORMAT_VERSION, files, None))
    (folder / INDEX_NAME).write_bytes(data)
    return size + len(data)


def make_entry(number: int, header: int) -> Entry:
    """Make up the entry of a feature file."""
    place = number % (3 * SAMPLES_PER_SHARD)
    return Entry(place * NUM_BYTES, NUM_BYTES, number, f"{number:032x}", header)


def main() -> None:
    """Write an index, read it, and say what that took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=300_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = write_index(folder, arguments.samples)
        before, began = read_memory(), time.perf_counter()
        samples, _ = read_shards(ShardFolder(name, ByteCache(folder / "cache", 0)))
        seconds, more = time.perf_counter() - began, read_memory() - before
    sys.stdout.write(
        f"{len(samples)} samples, index of {num_bytes / 2**20:.0f} MiB: {seconds:.1f} s, "
        f"{more / 2**30:.2f} GiB more in memory, at most "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB in all\n"
    )


def read_memory() -> int:
    """Return what this process has in memory, in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
