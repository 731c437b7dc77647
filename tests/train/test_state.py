"""Numbers that went wrong, or a base that is another: neither saved nor resumed from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from urae.backbones.flux import load_transformer
from urae.storage import digest_file
from urae.train import TrainConfig, train
from urae.train.adapter import fingerprint_base
from urae.train.checkpoint import Checkpoint, _digest_record, find_checkpoints
from urae.train.state import TrainingState


def spoil_at(monkeypatch, step: int, spoil) -> None:
    """Let a step leave NaN or infinity somewhere in the state."""
    advance = TrainingState.advance

    def advance_and_spoil(self, num_batches):
        lr = advance(self, num_batches)
        if self.step == step:
            with torch.no_grad():
                spoil(self)
        return lr

    monkeypatch.setattr(TrainingState, "advance", advance_and_spoil)


def spoil_weight(state: TrainingState) -> None:
    state.adapter.parameters[3].data.view(-1)[5] = torch.nan


def spoil_average(state: TrainingState) -> None:
    state.average.weights[3].view(-1)[5] = torch.inf


def spoil_optimizer(state: TrainingState) -> None:
    state.optimizer.state[state.adapter.parameters[3]]["exp_avg_sq"].view(-1)[5] = torch.inf


@pytest.mark.parametrize("step", [2, 4], ids=["middle", "last"])
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (spoil_weight, "plain_lora_weights"),
        (spoil_average, "pytorch_lora_weights"),
        (spoil_optimizer, "optimizer"),
    ],
    ids=["weight", "average", "optimizer"],
)
def test_what_is_not_finite_is_not_saved(settings, monkeypatch, step, spoil, name):
    config = settings(checkpoint_every=1, keep_checkpoints=1, ema_decay=0.9)
    spoil_at(monkeypatch, step, spoil)
    with pytest.raises(
        FloatingPointError,
        match=rf"of step {step} would hold NaN or infinity \({name}.safetensors\) and is "
        rf"not saved; the one of step {step - 1} is the last good one: .* lower --optimizer.lr "
        rf"\(--adapter.init .*checkpoint-00000{step - 1}\)",
    ):
        train(config)
    assert [each.step for each in find_checkpoints(config.output_dir)] == [step - 1]
    assert not list(config.output_dir.glob(".*"))
    assert not (config.output_dir / "pytorch_lora_weights.safetensors").exists()
    monkeypatch.undo()
    assert train(replace(config, resume=True)).finished


def test_without_a_good_checkpoint_the_remedy_is_another_rate(settings, monkeypatch):
    spoil_at(monkeypatch, 1, spoil_weight)
    with pytest.raises(
        FloatingPointError, match=r"there is none before it: start again with a lower"
    ):
        train(settings(checkpoint_every=1))


def rewrite(checkpoint: Checkpoint, name: str | None = None, value: float = 0, **changes) -> None:
    """Change a checkpoint as an earlier version would have written it, with its checksums."""
    if name is not None:
        tensors = load_file(checkpoint.path / name)
        next(iter(tensors.values())).view(-1)[0] = value
        with (checkpoint.path / name).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        save_file(tensors, checkpoint.path / name, header["__metadata__"])
    path = checkpoint.path / "state.json"
    record = json.loads(path.read_text()) | changes
    record = {key: value for key, value in record.items() if value is not None}
    if name is not None:
        record["files"][name] = digest_file(checkpoint.path / name)
    del record["sha256"]
    path.write_text(json.dumps(record | {"sha256": _digest_record(record)}))


@pytest.fixture
def interrupted(settings) -> TrainConfig:
    train(settings(steps=3, checkpoint_every=1))
    return settings(resume=True, checkpoint_every=1)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_saved_nan_counts_as_damage(interrupted, caplog, name, value):
    newest = find_checkpoints(interrupted.output_dir)[-1]
    rewrite(newest, name, value)
    assert train(interrupted).finished
    assert f"{newest.path} is damaged ({name}: it holds NaN or infinity)" in caplog.text
    assert "the run continues from step 2" in caplog.text


# --- the base -------------------------------------------------------------------------------------


@pytest.fixture
def other_base(settings, tmp_path) -> Path:
    """The base with the attention matrices that it had, and half of an MLP's weights."""
    folder = shutil.copytree(settings().model, tmp_path / "other_base")
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("ff.net.2.weight"):
            tensors[name] = tensors[name] / 2
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_another_base_with_the_same_attention_is_refused(interrupted, other_base):
    with pytest.raises(
        ValueError,
        match=r"started on a base with other weights in transformer_blocks\.\*\.ff\.net\.2; resume",
    ):
        train(replace(interrupted, model=str(other_base)))
    assert train(interrupted).step == 4


def test_a_checkpoint_of_before_bases_were_compared_resumes(interrupted, other_base):
    for checkpoint in find_checkpoints(interrupted.output_dir):
        rewrite(checkpoint, base_hashes=None)
    assert train(replace(interrupted, model=str(other_base))).step == 4


def test_a_base_is_the_same_in_any_dtype(bases):
    found = [
        fingerprint_base(load_transformer(bases["dev"], dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert found[0] == found[1]
    assert "single_transformer_blocks.*.proj_out" in found[0]
    assert len(set(found[0].values())) == len(found[0])
