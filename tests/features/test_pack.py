import errno
import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from urae.features.cache import cache
from urae.features.dataset import list_samples
from urae.features.pack import PackConfig, pack
from urae.features.store import empty_prompt_path

TWO_SAMPLES = 200 / 2**20  # GiB, of the tiny model


@pytest.fixture
def config(cached, tmp_path) -> PackConfig:
    return PackConfig(cached, tmp_path / "shards", TWO_SAMPLES)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_same_features_give_the_same_bytes(config, tmp_path):
    report = pack(config)
    assert (report.num_samples, len(report.written), report.unchanged) == (4, 2, [])
    files = read_folder(config.output_dir)
    assert len(files) == 2 * 2 + 2  # with the index and the empty prompt
    assert report.num_bytes == sum(len(data) for name, data in files.items() if "tar" in name)
    again = pack(replace(config, output_dir=tmp_path / "again"))
    assert again.written == report.written
    assert read_folder(tmp_path / "again") == files

    times = {path: path.stat().st_mtime_ns for path in config.output_dir.glob("*.tar")}
    report = pack(config)
    assert (report.written, report.unchanged, report.removed) == ([], again.written, [])
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_shards_are_bounded_and_have_their_checksum(config):
    pack(config)
    for path in config.output_dir.glob("*.tar"):
        assert path.stat().st_size <= TWO_SAMPLES * 2**30 + 1024
        index = json.loads(path.with_suffix(".json").read_text())
        assert index["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert index["num_bytes"] == path.stat().st_size
    assert len(pack(replace(config, shard_gib=1e-9)).written) == 4  # one sample at least
    assert len(list(config.output_dir.glob("*.tar"))) == 4


def test_files_are_grouped_as_webdataset_does(train_data, tmp_path):
    """By what is before the first dot, whatever the picture is called."""
    names = {"image_0": "plain", "image_1": "größe.v2%", "image_2": "x" * 120, "image_3": "__a__"}
    for path in train_data.glob("*.safetensors"):
        shutil.copy(path, tmp_path / f"{names[path.name[:7]]}{path.name[7:]}")
    pack(PackConfig(tmp_path, tmp_path / "shards"))
    (shard,) = (tmp_path / "shards").glob("*.tar")
    groups: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            stem, _, key = member.name.partition(".")
            groups.setdefault(stem, {})[key] = tar.extractfile(member).read()
    stems = [stem.replace("%2E", ".").replace("%25", "%") for stem in groups]
    assert stems == [sample.stem for sample in list_samples(tmp_path)]
    for stem, group in zip(stems, groups.values(), strict=True):
        assert list(group) == [
            f"{kind}.safetensors"
            for kind in ("latent_code", "generated_prompt_embed", "prompt_embed")
        ]
        for kind, data in group.items():
            assert data == (tmp_path / f"{stem}_{kind}").read_bytes()


def test_a_changed_sample_makes_another_shard(cached_copy, settings, config):
    config = replace(config, data_dir=cached_copy)
    before = pack(config)
    (config.output_dir / "mine.tar").touch()
    captions = cached_copy / "image_3.json"
    captions.write_text(json.dumps(json.loads(captions.read_text()) | {"prompt": "another"}))
    cache(settings(cached_copy))
    after = pack(config)
    assert len(after.written) == 1
    gone = set(before.written) - set(after.written) - set(after.unchanged)
    assert len(gone) == 1
    assert set(after.removed) == gone | {name.replace(".tar", ".json") for name in gone}
    assert (config.output_dir / "mine.tar").exists()


@pytest.mark.parametrize("name", ["features-000000", "features-000001", "urae_shards"])
def test_a_packing_that_was_stopped_goes_on(config, tmp_path, monkeypatch, name):
    """Until the new index is there, the folder is what it was before."""
    pack(replace(config, shard_gib=1.0))
    before = read_folder(config.output_dir)
    place = Path.replace

    def fill_disk(self, target):
        if target.name.startswith(name):
            raise OSError(errno.ENOSPC, "full")
        return place(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left for"):
        patch.setattr(Path, "replace", fill_disk)
        pack(config)
    now = read_folder(config.output_dir)
    assert before.items() <= now.items()
    assert not list(config.output_dir.glob("*.tmp"))
    report = pack(config)
    assert len(report.unchanged) == sum(".tar" in file for file in now.keys() - before.keys())
    pack(replace(config, output_dir=tmp_path / "fresh"))
    assert read_folder(config.output_dir) == read_folder(tmp_path / "fresh")


def test_what_a_killed_packing_was_writing_goes(config):
    pack(config)
    left = config.output_dir / ".features-000007-0123456789ab.tar.tmp"
    left.touch()
    assert pack(config).removed == [left.name]
    assert not left.exists()


def test_a_damaged_shard_is_packed_again(config):
    config = replace(config, shard_gib=1e-9)
    pack(config)
    files = read_folder(config.output_dir)
    first, second, third, _ = sorted(config.output_dir.glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.with_suffix(".json").write_text("{")
    assert pack(config).written == [first.name, second.name, third.name]
    assert read_folder(config.output_dir) == files


def test_damaged_features_are_not_packed(cached_copy, config):
    path = cached_copy / "image_2_latent_code.safetensors"
    tensors = load_file(path)
    tensors["mean"][0, 0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"image_2_latent\S+ cannot be used: 'mean' holds values"):
        pack(replace(config, data_dir=cached_copy))
    assert not (config.output_dir / "urae_shards.json").exists()


def test_the_empty_prompt_goes_along(config, cached):
    pack(config)
    (file,) = config.output_dir.glob("empty_prompt-*.safetensors")
    assert file.read_bytes() == empty_prompt_path(cached).read_bytes()


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match=r"shard_gib 0.0 must be a positive number"):
        PackConfig(tmp_path, tmp_path / "out", 0)
    with pytest.raises(ValueError, match="is the data folder; choose another"):
        PackConfig(tmp_path, tmp_path / ".." / tmp_path.name)
    with pytest.raises(ValueError, match="has no cached latents"):
        pack(PackConfig(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
