import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from urae.backbones.vae_plan import plan_encode
from urae.features import encoders
from urae.features.cache import cache
from urae.features.dataset import list_samples
from urae.features.encoders import Encoders
from urae.features.images import ImageError, decode_image
from urae.features.store import read_header

NUM_IMAGES, NUM_CAPTIONS = 4, 8

# Shares the first folder with this process, then is killed in the middle of a write in the second
CHILD = """
import json, os, signal, sys, time
from dataclasses import asdict
from pathlib import Path
import torch
from urae.features.cache import CacheConfig, cache

torch.set_num_threads(1)
shared, killed, model = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
fsync = os.fsync

def wait_once(descriptor):
    os.fsync = fsync
    (shared / "claimed").touch()
    while not (shared / "go").exists():
        time.sleep(0.01)
    fsync(descriptor)

os.fsync = wait_once
report = cache(CacheConfig(shared, model, 192, 48))
(shared / "child_report").write_text(json.dumps(asdict(report)))

def kill_at_eleventh(descriptor, calls=[]):
    calls.append(descriptor)
    if len(calls) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = kill_at_eleventh
cache(CacheConfig(killed, model, 192, 48))
"""


def features_of(folder: Path) -> dict[str, object]:
    """Read all that a folder's features hold: safetensors has no fixed order for metadata."""
    return {
        path.name: (
            read_header(path),
            {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()},
        )
        for path in folder.rglob("*.safetensors")
    }


def refuse_to_load(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(encoders, "load_pipeline", fail)


def edit_caption(folder, stem, **columns):
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | columns))


def test_the_cache_has_the_references_format_and_numbers(cached, train_data):
    ours, theirs = sorted(cached.glob("*.safetensors")), sorted(train_data.glob("*.safetensors"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for path in ours:
        mine, reference = load_file(path), load_file(train_data / path.name)
        assert mine.keys() == reference.keys()
        for key, tensor in mine.items():
            assert tensor.dtype == reference[key].dtype
            if path.name.endswith("_embed.safetensors"):
                torch.testing.assert_close(tensor, reference[key], atol=1e-5, rtol=0)
            else:
                assert (tensor.ndim, tensor.shape[0]) == (3, 16)


def test_latents_of_the_same_pixels_equal_the_references(train_data, base_dev):
    # The reference squeezes into fixed sizes (bicubic, the long side's pass first): its pixels,
    # encoded by us. Float32 sums in another order differ by up to 3.3e-6 of values up to 3.4.
    model = Encoders(Path(base_dev))
    for stem in ("image_0", "image_1", "image_2", "image_3"):
        reference = load_file(train_data / f"{stem}_latent_code.safetensors")
        height, width = (8 * side for side in reference["mean"].shape[1:])
        image = decode_image((train_data / f"{stem}.jpg").read_bytes(), stem)
        if height > width:
            image = image.resize((image.width, height), Image.Resampling.BICUBIC)
        mean, std = model.encode_image(image.resize((width, height), Image.Resampling.BICUBIC))
        torch.testing.assert_close(mean, reference["mean"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(std, reference["std"], atol=1e-5, rtol=1e-5)


def test_short_memory_changes_nothing(train_data, base_dev, monkeypatch):
    model, image = (
        Encoders(Path(base_dev)),
        decode_image((train_data / "image_0.jpg").read_bytes(), "0"),
    )
    whole = model.encode_image(image)
    size = (image.height, image.width)
    max_bytes = plan_encode(model._vae, *size).peak_bytes // 3
    assert not plan_encode(model._vae, *size, max_bytes=max_bytes).whole
    monkeypatch.setattr(encoders, "vae_bytes", lambda *_: max_bytes)
    torch.testing.assert_close(model.encode_image(image), whole, atol=1e-5, rtol=1e-5)


def test_an_image_of_its_buckets_size_equals_the_references(folder, train_data, settings):
    report = cache(settings(folder, resolution=256))
    assert {skip.reason for skip in report.skipped} == {"too small"}
    mine = load_file(folder / "image_1_latent_code.safetensors")
    reference = load_file(train_data / "image_1_latent_code.safetensors")
    torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


def test_metadata_says_what_a_file_was_made_from(cached, base_dev):
    latents = read_header(cached / "image_0_latent_code.safetensors")
    metadata = latents.metadata
    assert metadata.keys() == {
        "urae_features",
        "crc32",
        "dtype",
        "vae",
        "resolution",
        "image_sha256",
        "model",
        "height",
        "width",
    }
    assert (metadata["resolution"], metadata["dtype"]) == ("192", "float32")
    assert metadata["model"] == base_dev
    size = tuple(8 * side for side in latents.shapes["mean"][1:])
    assert (int(metadata["height"]), int(metadata["width"])) == size
    embeds = read_header(cached / "image_0_prompt_embed.safetensors").metadata
    assert embeds.keys() == {
        "urae_features",
        "crc32",
        "dtype",
        "text_encoders",
        "max_sequence_length",
        "caption_sha256",
        "model",
        "stem",
        "column",
    }


def test_the_empty_prompt_is_cached_once(cached, cached_copy, settings, base_dev):
    path = Path(".urae") / "empty_prompt_embed.safetensors"
    found = load_file(cached / path)
    t5, clip = Encoders(Path(base_dev)).encode_caption("", 48)
    assert torch.equal(found["caption_feature_t5"], t5)
    assert torch.equal(found["caption_feature_clip"], clip)
    before = (cached_copy / path).stat().st_mtime_ns
    cache(settings(cached_copy))
    assert (cached_copy / path).stat().st_mtime_ns == before
    cache(settings(cached_copy, max_sequence_length=32))
    assert load_file(cached_copy / path)["caption_feature_t5"].shape[0] == 32


def test_the_model_says_how_many_text_tokens(cached_copy, settings, base_dev, tmp_path):
    model = shutil.copytree(base_dev, tmp_path / "short")
    path = model / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 24}))
    cache(settings(cached_copy, model=str(model), max_sequence_length=None))
    embeds = read_header(cached_copy / "image_0_prompt_embed.safetensors")
    assert embeds.shapes["caption_feature_t5"][0] == 24


def test_a_second_run_does_nothing_and_loads_nothing(cached, settings, monkeypatch):
    refuse_to_load(monkeypatch)
    before = features_of(cached)
    report = cache(settings(cached))
    assert (report.latents.unchanged, report.latents.encoded) == (NUM_IMAGES, 0)
    assert (report.embeds.unchanged, report.embeds.encoded) == (NUM_CAPTIONS, 0)
    assert report.skipped == report.removed == []
    assert features_of(cached) == before


def test_the_references_files_are_kept_unless_overwritten(
    train_data, tmp_path, settings, monkeypatch
):
    folder = Path(shutil.copytree(train_data, tmp_path / "data"))
    before = features_of(folder)
    report = cache(settings(folder))
    assert (report.latents.kept, report.embeds.kept) == (NUM_IMAGES, NUM_CAPTIONS)
    after = features_of(folder)
    assert after.pop("empty_prompt_embed.safetensors")
    assert after == before
    with monkeypatch.context() as patch:
        refuse_to_load(patch)
        assert cache(settings(folder)).embeds.kept == NUM_CAPTIONS
    report = cache(settings(folder, overwrite=True))
    assert (report.latents.encoded, report.embeds.encoded) == (NUM_IMAGES, NUM_CAPTIONS)


def test_what_changed_is_encoded_again_and_nothing_else(cached_copy, settings):
    before = features_of(cached_copy)
    edit_caption(cached_copy, "image_1", prompt="a changed caption")
    image = Image.open(cached_copy / "image_2.jpg").rotate(180)
    image.save(cached_copy / "image_2.jpg")
    report = cache(settings(cached_copy))
    assert (report.latents.encoded, report.latents.unchanged) == (1, 3)
    assert (report.embeds.encoded, report.embeds.unchanged) == (1, 7)
    after = features_of(cached_copy)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"image_1_prompt_embed.safetensors", "image_2_latent_code.safetensors"}

    report = cache(settings(cached_copy, resolution=176))
    assert (report.latents.encoded, report.embeds.encoded) == (NUM_IMAGES, 0)
    report = cache(settings(cached_copy, resolution=176, max_sequence_length=32))
    assert (report.latents.encoded, report.embeds.encoded) == (0, NUM_CAPTIONS)
    (cached_copy / "image_3_latent_code.safetensors").write_bytes(b"cut")
    report = cache(settings(cached_copy, resolution=176, max_sequence_length=32))
    assert (report.latents.encoded, report.embeds.encoded) == (1, 0)


def test_another_model_is_encoded_again(cached_copy, settings, tmp_path, base_dev):
    other = Path(shutil.copytree(base_dev, tmp_path / "model"))
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"note": "other"}))
    report = cache(settings(cached_copy, model=str(Path(base_dev).with_name("base_dev"))))
    assert report.latents.unchanged == NUM_IMAGES
    report = cache(settings(cached_copy, model=str(other)))
    assert (report.latents.encoded, report.embeds.unchanged) == (NUM_IMAGES, NUM_CAPTIONS)


def test_every_skip_has_its_reason(cached_copy, settings):
    def spoil(name, data):
        (cached_copy / name).write_bytes(data)

    data = (cached_copy / "image_0.jpg").read_bytes()
    spoil("image_0.jpg", data[: len(data) // 2])
    Image.new("RGB", (64, 64)).save(cached_copy / "image_1.jpg")
    edit_caption(cached_copy, "image_2", generated_prompt=" ")
    (cached_copy / "image_3.json").write_text("{")
    spoil("text.png", b"no image")
    spoil("text.txt", b"a caption")
    report = cache(settings(cached_copy))
    assert {(skip.file, skip.reason) for skip in report.skipped} == {
        ("image_0.jpg", "truncated image"),
        ("image_1.jpg", "too small"),
        ("image_2.json", "empty caption"),
        ("image_3.jpg", "unreadable caption"),
        ("text.png", "unreadable image"),
    }
    details = {skip.file: skip.detail for skip in report.skipped}
    assert details["image_1.jpg"].startswith(
        "image_1.jpg is 64 x 64; resolution 192 needs 192 x 192"
    )
    # what would no longer be true is gone, and an image without readable caption is left alone
    assert sorted(report.removed) == [
        "image_0_latent_code.safetensors",
        "image_1_latent_code.safetensors",
        "image_2_generated_prompt_embed.safetensors",
    ]
    assert (cached_copy / "image_3_latent_code.safetensors").exists()
    written = json.loads((cached_copy / ".urae" / "cache_report.json").read_text())
    assert written["skipped"] == [
        {"file": skip.file, "reason": skip.reason, "detail": skip.detail} for skip in report.skipped
    ]


def test_what_cannot_be_read_now_loses_nothing(cached_copy, settings, monkeypatch):
    read = Path.read_bytes

    def fail(path):
        if path.name == "image_0.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    before = features_of(cached_copy)
    report = cache(settings(cached_copy))
    assert [(skip.file, skip.reason) for skip in report.skipped] == [
        ("image_0.jpg", "unreachable image")
    ]
    assert report.removed == []
    assert features_of(cached_copy) == before


def test_an_image_whose_captions_are_gone_is_no_longer_trained_on(cached_copy, settings):
    (cached_copy / "image_0.json").unlink()
    edit_caption(cached_copy, "image_1", prompt=" ", generated_prompt="")
    report = cache(settings(cached_copy))
    wanted = [
        f"image_{number}_{suffix}.safetensors"
        for number in (0, 1)
        for suffix in ("generated_prompt_embed", "latent_code", "prompt_embed")
    ]
    assert sorted(report.removed) == wanted
    assert not {"image_0", "image_1"} & {sample.stem for sample in list_samples(cached_copy)}


def test_a_mistyped_resolution_costs_nothing(cached_copy, settings):
    before = features_of(cached_copy)
    report = cache(replace(settings(cached_copy), resolution=4096))
    assert not report.num_ready and not report.removed
    assert features_of(cached_copy) == before


def test_features_whose_picture_is_gone_are_told(cached_copy, settings):
    (cached_copy / "image_0.jpg").unlink()
    report = cache(settings(cached_copy))
    assert report.pictureless == ["image_0"] and not report.removed
    assert "image_0" in {sample.stem for sample in list_samples(cached_copy)}


@pytest.fixture
def neighbours(cached_copy, settings):
    """A cached folder of `beach` and `beach_2`, as cameras and people number their pictures."""
    for old, new in (("image_0", "beach"), ("image_1", "beach_2")):
        for path in cached_copy.glob(f"{old}*"):
            if path.suffix == ".safetensors":
                path.unlink()
            else:
                path.rename(cached_copy / path.name.replace(old, new))
    cache(settings(cached_copy))
    return cached_copy


def captions_of(folder, stem):
    (columns,) = (each.embed_files for each in list_samples(folder) if each.stem == stem)
    return sorted(columns)


def test_a_picture_that_is_left_out_gives_its_captions_to_no_other(neighbours, settings):
    own = captions_of(neighbours, "beach")
    (neighbours / "beach_2_latent_code.safetensors").unlink()
    assert captions_of(neighbours, "beach") == own
    (neighbours / "beach_2.jpg").unlink()
    assert captions_of(neighbours, "beach") == own
    # as without our metadata, with the picture there
    (neighbours / "beach_2.jpg").touch()
    for path in neighbours.glob("beach_2*_embed.safetensors"):
        save_file(load_file(path), path)
    assert captions_of(neighbours, "beach") == own


def test_captions_of_a_picture_that_is_gone_stay(neighbours, settings):
    (neighbours / "beach_2.jpg").unlink()
    before = features_of(neighbours)
    report = cache(settings(neighbours))
    assert (report.removed, report.pictureless) == ([], ["beach_2"])
    assert features_of(neighbours) == before
    (neighbours / "beach.json").write_text("{")  # as while another program writes it
    assert cache(settings(neighbours)).removed == []
    assert features_of(neighbours) == before


def test_features_that_were_renamed_with_their_picture_are_its_own(neighbours):
    own = captions_of(neighbours, "beach_2")
    for path in sorted(neighbours.glob("beach_2*")):
        path.rename(neighbours / path.name.replace("beach_2", "shore_2"))
    assert captions_of(neighbours, "shore_2") == own


def test_a_picture_may_be_called_empty(cached_copy, settings):
    for path in cached_copy.glob("image_0.*"):
        path.rename(cached_copy / path.name.replace("image_0", "empty"))
    cache(settings(cached_copy))
    assert captions_of(cached_copy, "empty") == ["generated_prompt", "prompt"]


def test_a_storage_that_fails_for_a_moment_costs_no_features(cached_copy, settings, monkeypatch):
    path = cached_copy / "image_2_latent_code.safetensors"
    save_file(load_file(path), path)  # the reference's
    before = features_of(cached_copy)

    def fail(*_, **__):
        raise FileNotFoundError("Stale file handle")  # which safetensors calls all of them

    with monkeypatch.context() as patch:
        patch.setattr("urae.features.store.safe_open", fail)
        with pytest.raises(OSError, match=r"cannot be read \(Stale file handle\); check that"):
            cache(settings(cached_copy))
    assert features_of(cached_copy) == before


def test_names_that_are_too_long_are_skipped(folder, settings):
    for file in ("image_0.jpg", "image_0.json"):
        (folder / file).rename(folder / f"{'é' * 112}{Path(file).suffix}")
    report = cache(settings(folder))
    (skip,) = report.skipped
    assert (skip.reason, report.num_ready) == ("unfit file name", 3)
    assert "file name would have 259 bytes, of 250; rename" in skip.detail


def test_columns_and_captions_that_are_cut_are_told(cached_copy, settings):
    edit_caption(cached_copy, "image_0", prompt="red " * 100, artist="somebody")
    report = cache(settings(cached_copy))
    assert report.columns["artist"] == 1 and report.columns["prompt"] > 1
    (told,) = report.cut
    assert told.startswith("image_0_prompt_embed.safetensors: ")
    assert int(told.split()[1]) > 100
    assert not cache(settings(cached_copy)).cut


def test_what_another_process_has_made_is_not_read_again(folder, settings, monkeypatch):
    """Of many processes each would read every picture."""
    others, read = iter([True]), []

    def share(stage, done, total):
        if stage == "images" and next(others, False):
            assert cache(settings(folder)).latents.encoded == NUM_IMAGES
            monkeypatch.setattr("urae.features.cache.read_image", read.append)

    report = cache(settings(folder), progress=share)
    assert (report.latents.encoded, report.latents.shared) == (0, NUM_IMAGES)
    assert not read


def test_a_picture_that_has_changed_is_compared_by_its_bytes(cached_copy, settings):
    config, others = settings(cached_copy), iter([True])
    image = Image.open(cached_copy / "image_2.jpg").rotate(180)
    image.save(cached_copy / "image_2.jpg")

    def share(stage, done, total):
        if stage == "images" and next(others, False):
            assert cache(config).latents.encoded == 1

    report = cache(config, progress=share)
    assert (report.latents.encoded, report.latents.shared) == (0, 1)
    assert cache(config).latents.encoded == 0


@pytest.mark.parametrize(("local_rank", "gpu"), [("1", [1]), ("3", [1]), (None, [])])
def test_each_process_of_torchrun_takes_a_gpu_of_its_own(base_dev, monkeypatch, local_rank, gpu):
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert Encoders(Path(base_dev)).device.type == "cuda"
    assert taken == gpu


def test_bombs_are_skipped(folder, settings, monkeypatch):
    monkeypatch.setattr("urae.features.images.MAX_PIXELS", 300 * 220 - 1)
    report = cache(settings(folder))
    assert report.latents.encoded == 2
    reasons = [(skip.file, skip.reason) for skip in report.skipped]
    assert reasons == [("image_0.jpg", "decompression bomb"), ("image_3.jpg", "decompression bomb")]


def test_progress_is_told(folder, settings):
    calls = []
    cache(settings(folder), progress=lambda *call: calls.append(call))
    expected = [("inspect", done, 4) for done in range(5)]
    expected += [("captions", done, 8) for done in range(9)]
    expected += [("images", done, 4) for done in range(5)]
    assert calls == expected


def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written(
    folder, settings, monkeypatch, cached
):
    fsync, calls = os.fsync, []

    def fill(descriptor):
        calls.append(descriptor)
        if len(calls) > 10:  # all captions, the empty prompt and a picture
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        with pytest.raises(OSError, match=r"no space left for .* free some space and continue"):
            cache(settings(folder))
    assert len(features_of(folder)) == 10
    assert not list(folder.glob(".*.tmp"))
    report = cache(settings(folder))
    assert report.latents.encoded + report.embeds.encoded == NUM_IMAGES + NUM_CAPTIONS - 9
    assert features_of(folder) == features_of(cached)


def watch_decoding(monkeypatch, bad: dict[int, Exception]) -> list[str]:
    """Hold each encoding until the next image is being decoded; some cannot be."""
    found, begun, encode = [], threading.Condition(), Encoders.encode_image
    encoded = (number for number in range(NUM_IMAGES) if number not in bad)

    def decode_noted(data, name):
        with begun:
            found.append(name)
            begun.notify_all()
            if error := bad.get(len(found) - 1):
                raise error
        return decode_image(data, name)

    def encode_late(self, image):
        wanted = min(next(encoded) + 2, NUM_IMAGES)
        with begun:
            assert begun.wait_for(lambda: len(found) >= wanted, timeout=30)
            assert len(found) == wanted  # one ahead, no more
        return encode(self, image)

    monkeypatch.setattr("urae.features.cache.decode_image", decode_noted)
    monkeypatch.setattr(Encoders, "encode_image", encode_late)
    return found


def test_the_next_image_is_decoded_while_one_is_encoded(folder, settings, monkeypatch, cached):
    decoded = watch_decoding(monkeypatch, {})
    assert cache(settings(folder)).latents.encoded == NUM_IMAGES
    assert decoded == [f"image_{number}.jpg" for number in range(NUM_IMAGES)]
    assert features_of(folder) == features_of(cached)


def test_a_bad_image_read_ahead_is_skipped(folder, settings, monkeypatch, cached):
    bad = ImageError("truncated image", "image_1.jpg is truncated or corrupt")
    watch_decoding(monkeypatch, {1: bad})
    report = cache(settings(folder))
    assert [(s.file, s.reason) for s in report.skipped] == [("image_1.jpg", "truncated image")]
    assert report.latents.encoded == NUM_IMAGES - 1
    wanted = features_of(cached)
    del wanted["image_1_latent_code.safetensors"]
    assert features_of(folder) == wanted


def test_what_fails_ahead_fails_the_run_in_its_turn(folder, settings, monkeypatch):
    watch_decoding(monkeypatch, {2: RuntimeError("unforeseen")})
    with pytest.raises(RuntimeError, match="unforeseen"):
        cache(settings(folder))
    assert len(list(folder.glob("*_latent_code.safetensors"))) == 2
    assert not list(folder.glob(".*.tmp"))
    assert not [thread for thread in threading.enumerate() if "urae-reader" in thread.name]


def test_out_of_gpu_memory_says_what_to_try(folder, settings, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoders, "encode_image", fail)
    with pytest.raises(MemoryError, match=r"encoding image_\d.jpg \(.*\); try a lower --res"):
        cache(settings(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 200}, r"resolution 200 is not .* of 16 .*; try 192 or 208"),
        ({"max_sequence_length": 513}, "max_sequence_length 513 is outside 1 to 512"),
        ({"data_dir": Path("gone")}, "data folder gone does not exist"),
        ({"model": "no such model"}, "neither a local path nor a hub id"),
    ],
)
def test_bad_settings_fail_before_weights_load(folder, settings, monkeypatch, changes, message):
    refuse_to_load(monkeypatch)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cache(settings(folder, **changes))


@pytest.fixture(scope="module")
def child(tmp_path_factory, copy_sources, base_dev):
    """A second process, at work on two folders: `CHILD`."""
    folders = [copy_sources(tmp_path_factory.mktemp(name)) for name in ("shared", "killed")]
    command = [sys.executable, "-c", CHILD, *map(str, folders), base_dev]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        yield process, *folders
        process.kill()


def test_processes_share_the_work(child, settings, cached):
    process, folder, _ = child
    deadline = time.monotonic() + 120
    while not (folder / "claimed").exists():  # the child is busy with the first caption
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)

    def release(stage, done, total):
        if (stage, done) == ("captions", total - 1):  # all the others are done here meanwhile
            (folder / "go").touch()

    mine = cache(settings(folder), progress=release)
    assert features_of(folder) == features_of(cached)
    assert (mine.embeds.encoded, mine.embeds.shared) == (NUM_CAPTIONS - 1, 1)
    while not (folder / "child_report").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    theirs = json.loads((folder / "child_report").read_text())
    assert theirs["embeds"]["encoded"] == 1
    assert theirs["embeds"]["shared"] == NUM_CAPTIONS - 1
    assert mine.latents.encoded + theirs["latents"]["encoded"] == NUM_IMAGES


def test_a_killed_run_is_resumed_to_the_same_bits(child, settings, cached):
    process, _, folder = child
    assert process.wait(120) == -signal.SIGKILL
    assert len(features_of(folder)) == 10
    assert len(list(folder.glob(".*.tmp"))) == 1  # killed in the middle of a write
    report = cache(settings(folder))
    assert (report.embeds.unchanged, report.latents.unchanged) == (NUM_CAPTIONS, 1)
    assert report.latents.encoded == NUM_IMAGES - 1
    assert features_of(folder) == features_of(cached)
    assert not list(folder.glob(".*.tmp"))


def test_names_outside_ascii_and_utf8(folder, settings):
    for suffix in (".jpg", ".json"):
        (folder / f"image_0{suffix}").rename(folder / f"Grüße{suffix}")
        shutil.copy(folder / f"image_1{suffix}", folder / os.fsdecode(b"raw\xff" + suffix.encode()))
    report = cache(settings(folder))
    assert report.latents.encoded == NUM_IMAGES
    assert [(s.file, s.reason) for s in report.skipped] == [("raw\\xff.jpg", "unusable file name")]
    assert (folder / "Grüße_prompt_embed.safetensors").exists()
    assert cache(settings(folder)).latents.unchanged == NUM_IMAGES
