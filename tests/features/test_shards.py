import asyncio
import json
import logging
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry as file_systems

from urae.features import shard_folder
from urae.features.byte_cache import ByteCache
from urae.features.dataset import Sample, check_cache, load_embeds, load_latents
from urae.features.location import Features, open_features
from urae.features.pack import PackConfig, pack
from urae.features.shard_folder import ShardFolder
from urae.features.store import Fingerprints, fingerprint_encoders, fingerprint_file
from urae.train.ranks import MAX_WAIT_MINUTES

DIMS = {"latent_channels": 16, "t5_dim": 32, "clip_dim": 24}
TWO_SAMPLES = 200 / 2**20  # GiB, of the tiny model


@pytest.fixture(scope="module")
def packed(cached, tmp_path_factory) -> Path:
    """The cached folder in shards; to be read, or copied."""
    folder = tmp_path_factory.mktemp("packed")
    pack(PackConfig(cached, folder, TWO_SAMPLES))
    return folder


@pytest.fixture
def shards(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


@pytest.fixture
def far(packed, tmp_path, monkeypatch) -> str:
    """The shards where fsspec's memory stands for a bucket, with a local cache of their own."""
    monkeypatch.setenv("URAE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_folder, "WAITS", (0.0, 0.0, 0.0))
    files = MemoryFileSystem()
    files.put(f"{packed}/", "/bucket/data/", recursive=True)
    yield "memory://bucket/data"
    files.rm("/bucket", recursive=True)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Record what is read from the bucket."""
    found, cat_file = [], MemoryFileSystem.cat_file

    def record(self, path, *args, **kwargs):
        found.append(path)
        return cat_file(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", record)
    return found


def load_all(sample: Sample) -> list[torch.Tensor]:
    embeds = [load_embeds(file) for file in sample.embed_files.values()]
    return [*load_latents(sample), *(tensor for pair in embeds for tensor in pair)]


def assert_same(found: Features, wanted: Features) -> None:
    assert found.samples
    for one, other in zip(found.samples, wanted.samples, strict=True):
        assert (one.stem, one.height, one.width) == (other.stem, other.height, other.width)
        assert list(one.embed_files) == list(other.embed_files)
        assert one.latent_file.name == other.latent_file.name
        assert fingerprint_file(one.latent_file) == fingerprint_file(other.latent_file)
        assert all(map(torch.equal, load_all(one), load_all(other)))
    assert fingerprint_file(found.empty_prompt) == fingerprint_file(other_file(wanted))
    pair = load_embeds(found.empty_prompt), load_embeds(wanted.empty_prompt)
    assert all(map(torch.equal, *pair))


def other_file(features: Features) -> Path:
    assert isinstance(features.empty_prompt, Path)
    return features.empty_prompt


def test_shards_hold_what_loose_files_do(packed, cached, far, monkeypatch):
    wanted = open_features(cached, 1.0)
    monkeypatch.chdir(packed.parent)
    for place in (packed, str(packed), packed.name, f"file://{packed}", f"{far}/", far):
        assert_same(open_features(place, 1.0), wanted)


def test_the_references_features_can_be_packed(train_data, tmp_path):
    pack(PackConfig(train_data, tmp_path / "shards"))
    found, wanted = open_features(tmp_path / "shards", 1.0), open_features(train_data, 1.0)
    check_cache(found.samples, **DIMS, resolution=256, fingerprints=Fingerprints("any", "any"))
    assert found.empty_prompt is wanted.empty_prompt is None
    for one, other in zip(found.samples, wanted.samples, strict=True):
        assert all(map(torch.equal, load_all(one), load_all(other)))


def test_shards_must_fit_model_and_resolution(packed, base_dev):
    features, prints = open_features(packed, 1.0), fingerprint_encoders(Path(base_dev))
    options = {**DIMS, "resolution": 192, "fingerprints": prints}
    check_cache(features.samples, **options, empty_prompt=features.empty_prompt)
    with pytest.raises(
        ValueError, match=r"image_0_latent\S+ in shard .*resolution is 192, but this"
    ):
        check_cache(features.samples, **(options | {"resolution": 256}))
    with pytest.raises(ValueError, match=r"image_0_\w+_embed\S+ in shard \S+features-000000.*T5's"):
        check_cache(features.samples, **(options | {"t5_dim": 4096}))


# --- damage ---------------------------------------------------------------------------------------


def test_listing_reads_no_shard(shards):
    for path in shards.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert len(open_features(shards, 1.0).samples) == 4


@pytest.mark.parametrize("at", [0, 700, -3000, -1])
def test_a_shard_cut_short_is_refused_at_once(shards, at):
    path = max(shards.glob("*.tar"), key=lambda path: path.name)
    data = path.read_bytes()
    path.write_bytes(data[:at])
    with pytest.raises(ValueError, match=rf"shard \S+{path.name} has \d+ bytes, but") as caught:
        open_features(shards, 1.0)
    sample = {0: "image_2", 700: "image_2", -3000: "image_3"}.get(at)  # the end is of no sample
    assert sample is None or f"so sample {sample} is incomplete; copy" in str(caught.value)


@pytest.mark.parametrize("suffix", ["tar", "json"])
def test_a_missing_file_is_named(shards, suffix):
    path = next(shards.glob(f"features-000001-*.{suffix}"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path.name} is missing; restore the file"):
        open_features(shards, 1.0)


@pytest.mark.parametrize("place", [0, 5, 0.3, 0.9, -1])
def test_a_flipped_byte_is_found(shards, place):
    """In the length, the header and the values of a feature file."""
    sample = open_features(shards, 1.0).samples[2]
    file = sample.latent_file
    at = int(place * file.num_bytes) if isinstance(place, float) else place % file.num_bytes
    path = shards / file.shard
    data = bytearray(path.read_bytes())
    data[file.offset + at] ^= 4
    path.write_bytes(data)
    message = rf"image_2_latent\S+ in shard \S+{path.name} cannot be used: its bytes have changed"
    with pytest.raises(ValueError, match=message):
        load_latents(sample)


def test_every_flipped_byte_of_an_index_is_found(shards):
    path = next(shards.glob("features-000001-*.json"))
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=rf"{path.name} cannot be used: its bytes have chan"):
            open_features(shards, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "urae_shards.json is not an index of shards (: Invalid JSON"),
        ('{"version": "1"}', "urae_shards.json is not an index of shards (shards: Field required)"),
        (
            '{"version": "2", "shards": [], "empty_prompt": null}',
            "has version 2, but this urae rea",
        ),
    ],
)
def test_an_index_that_cannot_be_used(shards, text, message):
    (shards / "urae_shards.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        open_features(shards, 1.0)
    assert message in str(caught.value)


# --- from afar ------------------------------------------------------------------------------------


def test_what_was_read_from_afar_is_not_read_again(far, reads):
    load_all(open_features(far, 1.0).samples[1])
    assert len(reads) == 1 + 2 + 3  # the index, that of each shard, the files of the sample
    reads.clear()
    load_all(open_features(far, 1.0).samples[1])
    assert reads == ["/bucket/data/urae_shards.json"]
    reads.clear()
    load_all(open_features(far, 0.0).samples[0])
    load_all(open_features(far, 0.0).samples[0])
    assert len(reads) == 2 * (1 + 3)  # nothing more is kept, but what was is used


def test_a_damaged_copy_is_read_again(far, reads, tmp_path):
    sample = open_features(far, 1.0).samples[1]
    wanted = load_all(sample)
    for path in (tmp_path / "cache" / "shards").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    reads.clear()
    assert all(map(torch.equal, load_all(sample), wanted))
    assert len(reads) == 3


def test_a_failing_connection_is_tried_again(far, monkeypatch, caplog):
    samples = open_features(far, 1.0).samples
    cat_file, failures = MemoryFileSystem.cat_file, iter([RuntimeError("reset"), b"short"])

    def fail(self, path, *args, **kwargs):
        outcome = next(failures, None)
        if isinstance(outcome, Exception):
            raise outcome
        return cat_file(self, path, *args, **kwargs) if outcome is None else outcome

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    with caplog.at_level(logging.WARNING):
        load_latents(samples[0])
    assert "image_0_latent_code.safetensors in shard memory://bucket/data/features" in caplog.text
    assert caplog.text.count("trying again") == 2

    failures = iter([RuntimeError("reset")] * 4)
    message = r"image_1_latent\S+ in shard memory://\S+ cannot be read \(RuntimeError: reset\)"
    with pytest.raises(ConnectionError, match=message):
        load_latents(samples[1])
    failures = iter([b"short"] * 4)
    with pytest.raises(ValueError, match=r"image_1_latent\S+ in .* 5 bytes arrived, but \d+ were"):
        load_latents(samples[1])


class RefusalError(Exception):
    """As aiohttp's, of a server that answers with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.fixture
def server(packed, tmp_path, monkeypatch) -> list[Exception | float]:
    """Serve the shards at http://host as fsspec does; what is put in the list comes first.

    A number is for how many seconds the server says nothing.
    """
    faults: list[Exception | float] = []

    class Server(AsyncFileSystem):
        protocol = ("http", "https")
        cachable = False

        async def _cat_file(self, path, start=None, end=None, **_):
            for fault in [faults.pop(0)] if faults else []:
                if isinstance(fault, Exception):
                    raise fault
                await asyncio.sleep(fault)
            return (packed / path.rpartition("/")[2]).read_bytes()[start:end]

        async def _info(self, path, **_):
            try:
                return {"size": len(await self._cat_file(path))}
            except Exception as error:
                raise FileNotFoundError(path) from error

    monkeypatch.setitem(file_systems, "http", Server)
    monkeypatch.setenv("URAE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_folder, "WAITS", (0.0, 0.0, 0.0))
    return faults


def test_a_server_that_fails_is_not_said_to_have_lost_the_shard(server, caplog):
    folder = ShardFolder("http://host", ByteCache(Path("none"), 0))
    (index,) = json.loads(folder.read("urae_shards.json"))["shards"][:1]
    server += [RefusalError(503), OSError("reset")]
    assert folder.find_size(f"{index['shard']}.tar") > 0
    assert "(RefusalError: status 503); trying again" in caplog.text
    server += [RefusalError(503)] * 4
    with pytest.raises(
        ConnectionError, match=r"host/a.tar cannot be read \(RefusalError: status 503\)"
    ):
        folder.find_size("a.tar")
    caplog.clear()
    server += [RefusalError(404)]
    with pytest.raises(FileNotFoundError, match=r"host/a.tar is missing"):
        folder.find_size("a.tar")
    assert not caplog.text


def test_a_server_that_does_not_answer_is_not_waited_for(server, monkeypatch, caplog):
    monkeypatch.setattr(shard_folder, "MAX_SECONDS", 0.1)
    samples = open_features("http://host", 0.0).samples
    server += [60.0]
    load_latents(samples[0])
    assert "cannot be read (TimeoutError: not finished after 0.1 s); trying again" in caplog.text
    server += [60.0] * 4
    with pytest.raises(
        ConnectionError, match=r"image_0_latent\S+ in .* not finished after 0.1 s\)"
    ):
        load_latents(samples[0])


def test_a_limit_of_the_library_is_not_taken_for_ours(server, caplog):
    folder = ShardFolder("http://host", ByteCache(Path("none"), 0))
    server += [TimeoutError("Connection timeout to host http://host"), TimeoutError()]
    folder.read("urae_shards.json")
    assert "(TimeoutError: Connection timeout to host http://host); trying again" in caplog.text
    assert "(TimeoutError: not finished after " in caplog.text
    assert "120" not in caplog.text


def test_a_read_ends_before_the_other_processes_give_up():
    attempts = [*shard_folder.WAITS, 0.0]
    longest = sum(wait + shard_folder.MAX_SECONDS for wait in attempts)
    assert longest < 60 * MAX_WAIT_MINUTES


def test_a_shard_that_vanishes_is_named_at_once(far, caplog):
    sample = open_features(far, 1.0).samples[0]
    fsspec.filesystem("memory").rm(f"/bucket/data/{sample.latent_file.shard}")
    with pytest.raises(
        FileNotFoundError, match=r"image_0_latent\S+ in shard memory://\S+ is missing"
    ):
        load_latents(sample)
    assert not caplog.text


def test_urls_that_cannot_be_opened(monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"data memory://nowhere has no urae_shards.json"):
        open_features("memory://nowhere", 1.0)
    with pytest.raises(ValueError, match=r"data foo://a is not a kind of URL that fsspec knows"):
        open_features("foo://a", 1.0)
    with pytest.raises(ValueError, match=r"data https://host/a has a password in its URL"):
        open_features("https://me:secret@host/a", 1.0)

    def fail(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(shard_folder, "url_to_fs", fail)
    with pytest.raises(
        ImportError, match=r"\(Install s3fs .*\); for s3:// and https:// pip install s3fs"
    ):
        open_features("s3://bucket/a", 1.0)
