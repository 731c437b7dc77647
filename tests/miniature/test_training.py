"""The stages that make the miniature, on a recipe that takes seconds."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

from urae.features.sources import find_sources
from urae.miniature.autoencoder import reconstruction_losses
from urae.miniature.export import export_pipelines
from urae.miniature.flow import sample_batch
from urae.miniature.grammar import COLOURS, RELATIONS, SHAPES, TEXTURES, parse_caption
from urae.miniature.loop import LoopConfig, StageRun, discard_state, run_loop
from urae.miniature.model import (
    NATIVE_IMAGE_TOKENS,
    POLICY,
    TEXT_TOKENS,
    build_miniature,
    build_pipeline,
    build_tokenizers,
    count_parameters,
    read_weights,
    write_pipeline,
    write_weights,
)
from urae.miniature.paths import GuidedPaths
from urae.miniature.pool import Pool, tokenize, write_terse_caption
from urae.miniature.recipe import load_recipe
from urae.miniature.score import ScoreConfig, score_pipeline, summarize
from urae.miniature.stages import STAGES, load_stage, train_stage
from urae.miniature.synthetic import write_synthetic
from urae.miniature.text import TEXT_PARTS, label_tokens
from urae.miniature.world import caption, sample_scene, training_scene
from urae.resolution import read_base_policy

SCORE = ScoreConfig(side=192, num_captions=1, num_seeds=2, steps=1)
STAGE = "batch_size = 2\nnum_scenes = 3\nloop = { steps = 2, lr = 1e-3, warmup_steps = 1 }\n"
RECIPE = (
    "[vae]\npixels = 65536\nnum_scenes = 2\nlarge_sides = []\nlarge_share = 0.0\n"
    "num_held_out = 1\nloop = { steps = 2, lr = 1e-3, warmup_steps = 1 }\n"
    + f"[text]\n{STAGE}".replace("scenes", "captions")
    + "".join(f"[{name}]\n{STAGE}" for name in ("base", "refined", "dev", "schnell", "teacher_256"))
    + "".join(f"[{name}]\nside = 256\n{STAGE}" for name in ("teacher_512", "teacher_1024"))
)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_stages_are_sampled_with_the_shift_that_they_learnt(tmp_path):
    def write(stage, kind, names, metadata):
        parts = build_miniature(kind, guided=stage == "dev", seed=0)
        found = {name: parts[name] for name in names}
        write_weights(tmp_path / f"{stage}.safetensors", found, metadata)

    trained = RECIPE.replace("[schnell]\n", "[schnell]\nsigma_shift = 4.0\n")
    write("vae", "dev", ["vae"], {"latent_mean": "0.0", "latent_std": "1.0"})
    write("text", "dev", TEXT_PARTS, {})
    for stage, kind in (("dev", "dev"), ("schnell", "dev"), ("teacher_512", "teacher")):
        write(stage, kind, ["transformer"], {"urae.recipe": trained})
    shifts = {
        name: (config.use_dynamic_shifting, config.shift)
        for name in ("dev", "schnell", "teacher_512")
        for config in [load_stage(name, tmp_path).scheduler.config]
    }
    assert shifts == {"dev": (True, 3.0), "schnell": (False, 4.0), "teacher_512": (False, 3.0)}


def test_the_sizes_are_those_promised():
    dev = build_miniature("dev", guided=True, seed=0)
    teacher = build_miniature("teacher", guided=False, seed=0)
    assert 4.5e6 < count_parameters([dev["transformer"]]) < 5.5e6
    # what passes between stages: the teacher, the VAE and the text encoders in 16 bits
    rest = [dev[name] for name in ("vae", "text_encoder", "text_encoder_2")]
    assert 2 * count_parameters([teacher["transformer"], *rest]) < 20 * 2**20


def test_blocks_begin_as_the_identity():
    transformer = build_miniature("dev", guided=True, seed=0)["transformer"]
    hidden, text = torch.randn(1, 6, 192), torch.randn(1, 4, 192)
    positions = transformer.pos_embed(torch.zeros(10, 3))
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        found_text, found = block(hidden, text, torch.randn(1, 192), positions)
        assert torch.equal(found, hidden) and torch.equal(found_text, text)


def test_every_caption_fits_into_the_text_tokens():
    captions = [caption(sample_scene(seed)) for seed in range(300)]
    t5, clip = tokenize(captions)
    clip_tokenizer, t5_tokenizer = build_tokenizers()
    assert t5.shape == (300, TEXT_TOKENS)
    assert (t5[:, -1] == t5_tokenizer.pad_token_id).all()
    assert not (t5 == t5_tokenizer.unk_token_id).any()
    assert (clip[:, -1] == clip_tokenizer.eos_token_id).all()
    assert len({tuple(row) for row in t5.tolist()}) == len(set(captions))


def test_labels_say_what_each_word_belongs_to():
    said = parse_caption("a red ring below a large cross on a dotted background")
    t5_ids, _ = tokenize([caption(said)])
    labels = label_tokens(t5_ids, [said])[0]
    words = caption(said).split()
    scene = [2, 1 + TEXTURES.index("dotted"), 0, 0]
    ring = [0, 1 + COLOURS.index("red"), 1 + SHAPES.index("ring"), 1 + RELATIONS.index("below"), 0]
    cross = [3, 0, 1 + SHAPES.index("cross"), 0, 1 + RELATIONS.index("below")]
    for number, word in enumerate(words):
        belongs_to = ring if number < 3 else cross if number < 7 else [-100] * 5
        assert labels[number].tolist() == belongs_to + scene, word
    assert (labels[len(words) + 1 :] == -100).all()  # the end of the sentence has labels


def test_terse_captions_say_less_but_nothing_false():
    shorter = 0
    for seed in range(100):
        full = sample_scene(seed).description
        terse = parse_caption(write_terse_caption(full, seed))
        shorter += terse != full
        for said, true in zip(terse.objects, full.objects, strict=True):
            assert said.size in (None, true.size) and said.colour in (None, true.colour)
            assert said.shape == true.shape
        assert terse.texture in (None, full.texture) and terse.light in (None, full.light)
        for relation, true_relation in zip(terse.relations, full.relations, strict=True):
            assert relation in (None, true_relation)
    assert 10 < shorter < 40


def test_synthetic_pictures_are_a_folder_to_cache(tmp_path):
    parts = build_miniature("teacher", guided=False, seed=0)
    pipe = build_pipeline(parts, static_shift=None, latent_mean=0.0, latent_std=1.0)
    pipe.set_progress_bar_config(disable=True)
    write_synthetic(tmp_path, pipe, range(3), seed=1, side=64, steps=1)
    (tmp_path / "000001.png").unlink()  # as if killed there
    before = (tmp_path / "000000.png").stat().st_mtime_ns
    write_synthetic(tmp_path, pipe, range(3), seed=1, side=64, steps=1)
    sources, skips = find_sources(tmp_path)
    assert [source.image.name for source in sources] == [f"00000{n}.png" for n in range(3)]
    assert not skips
    assert sources[2].captions == {"prompt": caption(training_scene(1, 2))}
    assert (tmp_path / "000000.png").stat().st_mtime_ns == before


def test_pictures_of_two_teachers_do_not_mix(tmp_path):
    def write(weights, dtype=torch.float32, **sampling):
        parts = build_miniature("teacher", guided=False, seed=weights)
        pipe = build_pipeline(parts, static_shift=None, latent_mean=0.0, latent_std=1.0).to(dtype)
        pipe.set_progress_bar_config(disable=True)
        sampling = {"seed": 1, "side": 32, "steps": 1, **sampling}
        return write_synthetic(tmp_path, pipe, range(2), **sampling)

    assert write(weights=0) == 2
    assert write(weights=0, dtype=torch.bfloat16) == 0  # as a GPU would load it
    message = "another set .*steps 1, guidance 3.5, teacher .*; choose another folder, or delete"
    for other in ({"weights": 1}, {"weights": 0, "steps": 2}, {"weights": 0, "guidance_scale": 2}):
        with pytest.raises(ValueError, match=message):
            write(**other)
    with pytest.raises(ValueError, match="height 40 is not a positive multiple of 16"):
        write(weights=0, side=40)


def test_edges_cost_more_than_areas_of_the_same_error():
    wanted = torch.zeros(1, 3, 32, 32)
    flat, stripes = torch.full_like(wanted, 0.1), torch.full_like(wanted, 0.1)
    stripes[..., ::2] *= -1
    assert reconstruction_losses(wanted, wanted) == (0, 0)
    (flat_error, flat_bands), (error, bands) = (
        reconstruction_losses(each, wanted) for each in (flat, stripes)
    )
    assert flat_error == error
    assert flat_bands < 1e-6 < 0.09 < bands


def make_pool(count):
    """Captions are their scene's number from 1, and 0 the empty one."""
    ids, empty = torch.arange(count)[:, None] + 1, torch.zeros(1, 1, dtype=torch.long)
    return Pool(torch.randn(count, 16, 4, 4), ids, ids, torch.ones(count), empty, empty)


def test_weights_draw_some_scenes_more_often():
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 4.0])
    pool = replace(make_pool(6), weights=weights)
    batch = sample_batch(pool, 4000, torch.Generator().manual_seed(0), 0.0)
    shares = torch.bincount(batch.t5_ids[:, 0] - 1, minlength=6) / 4000
    torch.testing.assert_close(shares, weights / 8, rtol=0, atol=0.03)
    assert shares[4] == 0
    paths = GuidedPaths(replace(pool, weights=weights * (weights > 1)), 50, (2.0, 4.0), 3.0)
    paths.restart(torch.Generator().manual_seed(0))
    assert (paths.t5_ids == 6).all()


def test_guided_paths_lead_from_noise_to_where_the_velocity_points():
    pool = make_pool(7)
    paths = GuidedPaths(pool, 5, (2.0, 4.0), sigma_shift=3.0)
    generator = torch.Generator().manual_seed(0)
    restarts, arrivals = 0, 0
    for _ in range(100):
        paths.restart(generator)
        assert ((paths.guidance >= 2) & (paths.guidance <= 4)).all()
        assert torch.equal(paths.t5_ids, paths.clip_ids)
        restarts += (paths.sigmas == 1).sum().item()
        ends = pool.latents[paths.t5_ids[:, 0] - 1]
        paths.advance((paths.latents - ends) / paths.sigmas[:, None, None, None])
        done = paths.sigmas == 0
        arrivals += done.sum().item()
        torch.testing.assert_close(paths.latents[done], ends[done], rtol=0, atol=1e-5)
    assert 5 * 100 / 32 <= restarts <= 5 * (100 / 16 + 1) and restarts - 5 <= arrivals <= restarts


def test_dropped_captions_are_the_empty_one():
    pool = make_pool(5)
    batch = sample_batch(pool, 2000, torch.Generator().manual_seed(0), 0.1)
    dropped = batch.t5_ids[:, 0] == 0
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(dropped, batch.clip_ids[:, 0] == 0)
    kept = batch.t5_ids[~dropped, 0] - 1
    assert torch.equal(batch.latents[~dropped], pool.latents[kept])


def test_a_stopped_loop_goes_on_to_the_same_bits(tmp_path):
    def train(name, max_seconds):
        torch.manual_seed(0)
        module = nn.Linear(4, 4)

        def compute_loss(step, generator):
            inputs = torch.randn(8, 4, generator=generator)
            return (module(inputs) - inputs).square().mean(), {}

        config = LoopConfig(steps=30, lr=1e-2, warmup_steps=3, ema_decay=0.9)
        run = StageRun(tmp_path, 1, {}, torch.device("cpu"), max_seconds)
        if not run_loop(module, compute_loss, config, name, run):
            return None
        assert run.state_file(name).is_file()  # until what was trained is written
        discard_state(name, run)
        return module

    whole = train("whole", math.inf)
    pieces = 1
    while (found := train("pieces", 0)) is None:
        pieces += 1
    assert pieces == 30
    for wanted, got in zip(whole.parameters(), found.parameters(), strict=True):
        assert torch.equal(wanted, got)
    assert not list(tmp_path.iterdir())


def test_a_stage_asked_to_stop_saves_its_step_and_goes_on(recipe, tmp_path, monkeypatch):
    steps = []

    def train(_, run):
        module = nn.Linear(2, 2)

        def compute_loss(step, generator):
            steps.append(step)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return module(torch.ones(1, 2)).square().mean(), {}

        return run_loop(module, compute_loss, LoopConfig(steps=5, lr=1e-2), "vae", run)

    monkeypatch.setitem(STAGES, "vae", train)
    assert train_stage("vae", recipe, tmp_path) is None
    assert train_stage("vae", recipe, tmp_path) == tmp_path / "vae.safetensors"
    assert steps == [0, 1, 2, 3, 4]


def test_the_clock_of_a_stage_counts_what_comes_before_its_steps(recipe, tmp_path, monkeypatch):
    steps = []

    def train(_, run):
        module = nn.Linear(2, 2)
        monkeypatch.setattr("urae.miniature.loop.time.monotonic", lambda: run.began + 61)

        def compute_loss(step, generator):
            steps.append(step)
            return module(torch.ones(1, 2)).square().mean(), {}

        return run_loop(module, compute_loss, LoopConfig(steps=5, lr=1e-2), "vae", run)

    monkeypatch.setitem(STAGES, "vae", train)
    assert train_stage("vae", recipe, tmp_path, max_seconds=60) is None
    assert steps == [0]


def test_the_loop_is_adamw_with_clipped_gradients_and_averaged_weights(tmp_path):
    """One vector of all parameters gives what the parameters one by one give."""

    def build():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5))
        module[0].to(memory_format=torch.channels_last)
        module[2].weight.requires_grad_(False)
        return module

    def loss_of(module, generator):
        inputs = torch.randn(4, 2, 4, 4, generator=generator)
        return 9 * (module(inputs) - 1).square().mean()

    config = LoopConfig(steps=6, lr=1e-2, warmup_steps=1, decay_share=0.01, ema_decay=0.5)
    wanted, found = build(), build()
    run = StageRun(tmp_path, 1, {}, torch.device("cpu"), math.inf)
    assert run_loop(found, lambda _, generator: (loss_of(found, generator), {}), config, "x", run)
    trained = [each for each in wanted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    averages = None
    for step in range(6):
        loss_of(wanted, torch.Generator().manual_seed(run.seed_step(step))).backward()
        assert nn.utils.clip_grad_norm_(trained, 1.0) > 1
        optimizer.step()
        optimizer.zero_grad()
        now = [each.detach().clone() for each in trained]
        averages = [torch.lerp(a, b, 0.5) for a, b in zip(averages or now, now, strict=True)]
    left = [each for each in found.parameters() if each.requires_grad]
    for average, got in zip(averages, left, strict=True):
        torch.testing.assert_close(average, got)
    assert torch.equal(wanted[2].weight, found[2].weight)


@pytest.mark.parametrize(
    "spoil",
    [lambda weights: weights.sum() * math.nan, lambda weights: (0 * weights).abs().sqrt().sum()],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_the_loop_and_is_not_saved(tmp_path, spoil):
    module = nn.Linear(1, 1)

    def run(compute_loss, steps):
        config = LoopConfig(steps=steps, lr=1e-3)
        stage = StageRun(tmp_path, 0, {}, torch.device("cpu"), math.inf)
        return run_loop(module, compute_loss, config, "vae", stage)

    run(lambda *_: (module.weight.sum() + module.bias.sum(), {}), steps=1)
    (state,) = tmp_path.iterdir()
    good = state.read_bytes()
    with pytest.raises(FloatingPointError, match="step 2: loss or gradient is nan; lower lr"):
        run(lambda *_: (spoil(module.weight) + module.bias.sum(), {}), steps=2)
    assert state.read_bytes() == good


def test_weights_round_trip(tmp_path):
    vae = build_miniature("dev", guided=True, seed=0)["vae"]
    write_weights(tmp_path / "vae.safetensors", {"vae": vae}, {"note": "x"})
    other = build_miniature("dev", guided=True, seed=1)["vae"]
    assert read_weights(tmp_path / "vae.safetensors", {"vae": other})["note"] == "x"
    for wanted, found in zip(vae.parameters(), other.parameters(), strict=True):
        assert torch.equal(wanted.half().float(), found)
    with pytest.raises(FileNotFoundError, match=r"urae miniature train base"):
        read_weights(tmp_path / "base.safetensors", {"vae": other})
    with pytest.raises(ValueError, match="does not hold this transformer"):
        read_weights(tmp_path / "vae.safetensors", {"transformer": other})


def test_the_pipeline_is_a_stock_one(tmp_path):
    parts = build_miniature("dev", guided=True, seed=0)
    write_pipeline(
        tmp_path, build_pipeline(parts, static_shift=None, latent_mean=0.1, latent_std=0.5)
    )
    assert read_base_policy(tmp_path) == POLICY
    assert POLICY.native_sequence_length == NATIVE_IMAGE_TOKENS + TEXT_TOKENS == 320
    pipe = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.scaling_factor == 2.0
    # at its native size its schedule is FLUX.1-dev's at 1024 x 1024
    scheduler = pipe.scheduler.config
    assert (scheduler.max_image_seq_len, scheduler.max_shift) == (256, 1.15)
    image = pipe(
        caption(sample_scene(0)),
        height=64,
        width=96,
        num_inference_steps=1,
        max_sequence_length=TEXT_TOKENS,
    ).images[0]
    assert image.size == (96, 64)


def test_an_unknown_stage_and_a_wrong_recipe(recipe, tmp_path):
    with pytest.raises(ValueError, match="stage 'vea' is unknown; choose one of vae, text, base"):
        train_stage("vea", recipe, tmp_path)
    recipe.write_text(RECIPE.replace("side", "sides"))
    with pytest.raises(ValueError, match="unknown key"):
        train_stage("vae", recipe, tmp_path)


def test_the_committed_recipe_is_one(pytestconfig):
    recipe = load_recipe(pytestconfig.rootpath / "recipes" / "miniature" / "stages.toml")
    assert recipe.teacher_512.side == 512


@pytest.mark.slow
def test_the_stages_follow_one_another(recipe, tmp_path):
    work = tmp_path / "work"
    with pytest.raises(
        FileNotFoundError, match="unpack, or train that stage first: urae miniature train"
    ):
        train_stage("base", recipe, work)
    for name in STAGES:
        while (path := train_stage(name, recipe, work, max_seconds=0)) is None:
            pass
        assert path == work / f"{name}.safetensors"
    assert sorted(file.name for file in work.iterdir()) == sorted(
        f"{name}.safetensors" for name in STAGES
    )
    for folder in export_pipelines(work, tmp_path / "models"):
        record = json.loads((folder / "recipe.json").read_text())
        assert record["dev"]["urae.recipe"] == RECIPE
        wanted = ["vae", "text", "base", "refined", "dev", "schnell"]
        assert list(record) == wanted[: 6 if folder.name == "miniature-schnell" else 5]
        # an untrained miniature draws nothing that a caption says, with either kind of guidance
        pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        assert summarize(score_pipeline(pipe, SCORE), SCORE.num_captions)["share"] == 0
    base = load_stage("base", work)
    base.set_progress_bar_config(disable=True)
    assert len(score_pipeline(base, SCORE)) == 2
    with pytest.raises(ValueError, match="stage 'vae' is not a transformer"):
        load_stage("vae", work)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("lr", 0.0), ("decay_share", 0.0), ("ema_decay", 1.0)]
)
def test_a_loop_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"{field} {value} must be"):
        LoopConfig(**{"steps": 1, "lr": 1e-3, field: value})
