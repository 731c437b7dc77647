"""The README and docs/ say what is so: snippets run, commands parse, links and files are there.

A Python snippet runs on tiny models after those before it on its page, unless a comment of the form
`<!-- not run: reason -->` stands over it; then it only has to compile.
"""

import ast
import itertools
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import typer.main
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from urae.cli.main import app
from urae.miniature.check import SceneReport

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "urae"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    page: Path
    language: str
    runs: bool
    text: str


def snippets(page: Path) -> list[Snippet]:
    found = CODE.findall(page.read_text())
    return [Snippet(page, language, not mark, text) for mark, language, text in found]


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text())


ALL = [snippet for page in PAGES for snippet in snippets(page)]
PYTHON_PAGES = sorted({snippet.page for snippet in ALL if snippet.language == "python"})


def test_every_snippet_has_a_known_language():
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(snippets(page)), page
    assert {snippet.language for snippet in ALL} == {"python", "sh", "text", "bibtex", "toml"}


def test_recipes_parse(tmp_path):
    from urae.cli.train import read_recipe

    for number, snippet in enumerate(each for each in ALL if each.language == "toml"):
        recipe = tmp_path / f"{number}.toml"
        recipe.write_text(snippet.text)
        data_dir = None if "[[data]]" in snippet.text else tmp_path
        read_recipe(recipe, [], {"data_dir": data_dir, "output_dir": tmp_path})


# --- Python ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(bases, expected, tmp_path, monkeypatch):
    """A folder with what the snippets name, and the names that they use for models and sizes."""
    from urae.adapters.files import LowRank, write_lora

    generator = torch.Generator().manual_seed(0)
    factors = LowRank(
        torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
    )
    write_lora(tmp_path / "style.safetensors", {"transformer_blocks.0.attn.to_q": factors})
    lora = load_file(expected / "dev_4k_lora_conversion.safetensors")
    save_file(lora, tmp_path / "my_4k.safetensors")
    copy_pictures(expected.parent / "train_data", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return {
        "black-forest-labs/FLUX.1-dev": str(bases["dev"]),
        "Huage001/URAE/urae_2k_adapter": str(expected / "dev_2k_lora"),
        "Huage001/URAE/urae_4k_adapter": str(expected / "dev_4k_minor"),
        '"flux-dev"': f'"{bases["dev"]}"',
        '"cuda"': '"cpu"',
        "torch.bfloat16": "torch.float32",
        "resolution=2048": "resolution=64",
        "2048": "32",
        "steps=2000": "steps=2",
        "guidance_scale=3.5": "guidance_scale=3.5, num_inference_steps=2",
        "num_inference_steps=24": "num_inference_steps=1",
        "strength=0.4": "strength=0.4, num_inference_steps=5",
        "seed=7": "seed=7, steps=2",
    }


def copy_pictures(source: Path, folder: Path) -> None:
    folder.mkdir()
    for path in sorted(source.glob("image_[01].*")):
        (folder / path.name).write_bytes(path.read_bytes())


@pytest.mark.filterwarnings("ignore")  # those of torchao and of diffusers' progress bars
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.stem)
def test_python_snippets_run(page, tiny, capsys):
    names: dict[str, object] = {"__name__": "snippet"}
    if page.stem == "train":
        run_python((ROOT / "docs" / "cache.md"), tiny, {"__name__": "snippet"})
    run_python(page, tiny, names)
    if page.stem in ("README", "adapt"):
        assert isinstance(names["image"], Image.Image)


def run_python(page: Path, tiny: dict[str, str], names: dict[str, object]) -> None:
    for snippet in snippets(page):
        if snippet.language != "python":
            continue
        ast.parse(snippet.text, filename=str(page))
        if snippet.runs:
            text = snippet.text
            for real, small in tiny.items():
                text = text.replace(real, small)
            exec(compile(text, f"{page.name}, made small", "exec"), names)


# --- the command line -----------------------------------------------------------------------------


def shell_commands() -> list[tuple[str, list[str]]]:
    """Return the words of each command line of the pages, with the page's name."""
    return [
        (snippet.page.name, words)
        for snippet in ALL
        if snippet.language == "sh"
        for line in snippet.text.replace("\\\n", " ").splitlines()
        if (words := shlex.split(line, comments=True))
    ]


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Return the arguments of each `urae` command line, with the page's name."""
    found = []
    for page, words in shell_commands():
        if words[0] == "torchrun" or words[:2] == ["accelerate", "launch"]:
            words = words[words.index("-m") + 1 :]
        if words[0] == "urae":
            found.append((page, tuple(words[1:])))
    return found


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Put recorders in the place of the four jobs, and what the pages name in a folder."""
    from urae.features.cache import CacheReport, Counts
    from urae.features.pack import PackReport
    from urae.generate import estimate as generation
    from urae.generate.plan import Plan
    from urae.study import StudyResult
    from urae.train import Pushed, StepReport, TrainResult
    from urae.train.estimate import TERMS, Estimate, Way
    from urae.train.plan import TrainPlan
    from urae.train.probe import Probe

    calls = {}

    def stand_in(name, result):
        def job(config=None, *_, **__):
            calls[name] = config
            return result

        return job

    monkeypatch.setattr(
        "urae.features.cache.cache", stand_in("cache", CacheReport(Counts(encoded=1)))
    )
    monkeypatch.setattr("urae.features.pack.pack", stand_in("pack", PackReport()))
    result = TrainResult(1, Path("adapter.safetensors"), True, 1)
    monkeypatch.setattr("urae.train.train", stand_in("train", result))
    monkeypatch.setattr("urae.train.push", stand_in("push", Pushed(Path("hub"), None)))
    monkeypatch.setattr("urae.adapters.convert.convert", stand_in("convert", Path("out")))
    monkeypatch.setattr("urae.generate.generate", stand_in("generate", [Path("a.png")]))
    monkeypatch.setattr("urae.cli.generate.launch", stand_in("generate", None))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    stage = generation.Stage(0, 0)
    tiers = (generation.Estimate("resident", stage, stage, stage, 0),)
    generating = Plan(tiers, 2**30, False, None, 28, 1, 1e12, {})
    monkeypatch.setattr("urae.generate.plan.plan", stand_in("plan", generating))
    step = StepReport(1, 0.1, 1.0, 1e-4, 2.0, 0.0, (None,), 32, 32, None)
    terms = {name: 2**30 for name in (*TERMS, "host_bytes")}
    training = TrainPlan(
        (), 0, 1.0, 1e15, (Estimate(Way("resident", "full"), **terms),), 2**40, 1, 1
    )
    monkeypatch.setattr("urae.train.plan.plan_training", stand_in("plan", training))
    probed = Probe((step,), training.estimates[0], 1.0)
    monkeypatch.setattr("urae.train.probe.probe", stand_in("plan", probed))
    study = StudyResult(1, 1, Path("a.md"))
    monkeypatch.setattr("urae.study.run_study", stand_in("study", study))
    monkeypatch.setattr("urae.web.serve", stand_in("web", None))
    for name, result in {
        "stages.train_stage": Path("vae.safetensors"),
        "export.export_pipelines": [Path("miniature-dev")],
        "export.export_adapters": [Path("miniature_2k_lora.safetensors")],
        "stages.load_stage": SimpleNamespace(
            to=lambda _: SimpleNamespace(set_progress_bar_config=lambda **_: None)
        ),
        "score.load_scored": None,
        "score.default_sampling": (24, 3.5),
        "score.score_pipeline": [SceneReport(*[True] * 9)] * 500,
        "sources.write_folder": 0,
    }.items():
        monkeypatch.setattr(f"urae.miniature.{name}", stand_in("miniature", result))
    for folder in ("recipes", "demo"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "prompts.txt").write_text("a lighthouse\n")
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("page", "arguments"),
    [pytest.param(*each, id=f"{each[0]}-{n}") for n, each in enumerate(commands())],
)
def test_commands_parse(page, arguments, jobs):
    outcome = CliRunner().invoke(app, list(arguments))
    assert outcome.exception is None, outcome.exception
    assert outcome.exit_code == 0, outcome.output
    if "--fields" not in arguments and "--help" not in arguments:
        assert arguments[0] in jobs


def test_all_four_jobs_have_commands_in_the_readme():
    jobs = {arguments[0] for page, arguments in commands() if page == "README.md"}
    assert jobs >= {"cache", "train", "convert", "generate"}


def test_make_targets_and_scripts_exist():
    makefile = (ROOT / "Makefile").read_text()
    for _, words in shell_commands():
        assert words[0] in {"urae", "accelerate", "torchrun", "sbatch", "make", "python", "pip"}
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
        if words[0] == "sbatch":
            assert (ROOT / words[-1]).exists()
        if words[0] == "python":
            source = (ROOT / words[1]).read_text()
            for option in words[2:]:
                assert not option.startswith("--") or f'"{option}"' in source


def test_options_in_prose_exist():
    command = typer.main.get_command(app)
    commands = [*command.commands.values()]
    commands += [sub for each in commands for sub in getattr(each, "commands", {}).values()]
    known = {name for each in commands for parameter in each.params for name in parameter.opts}
    from urae.config import describe_fields
    from urae.study import StudyConfig
    from urae.train import TrainConfig

    for fields in (TrainConfig, StudyConfig):
        known |= {f"--{row[0]}".replace("_", "-") for row in describe_fields(fields)}
    known |= {"--help", "--name", "--check"}  # --name stands for any; --check is a benchmark's
    known.add("--shutdown-timeout")  # torchrun's
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", prose(page)):
            for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span):
                assert option in known, f"{page.name}: {option}"


# --- files and links ------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text


def test_the_tree_is_the_code():
    (tree,) = (s.text for s in snippets(ROOT / "README.md") if s.language == "text")
    listed, folders = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        path = ROOT / "".join(folders)
        assert path.exists(), line
        listed.add(path)
    assert ROOT / "urae" / "cli" in listed  # one line for its files
    for module in PACKAGE.rglob("*.py"):
        if not module.stem.startswith("__") and module.parent.name != "cli":
            assert module in listed, f"{module} is not in the README's tree"


def test_files_named_in_prose_exist():
    pattern = re.compile(r"^(?:urae|docs|recipes|benchmarks|tests|demo)/[\w./-]*$")
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", prose(page)):
            if pattern.match(span):
                assert (ROOT / span).exists(), f"{page.name}: {span}"


def test_the_recipe_table_is_the_recipes():
    import tomllib

    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \[(\S+\.toml)\]\((\S+)\) \|(.+)\|$", text, re.MULTILINE)
    assert {row[0] for row in rows} == {path.name for path in (ROOT / "recipes").glob("*.toml")}
    for _, path, cells in rows:
        recipe = tomllib.loads((ROOT / path).read_text())
        _, resolution, adapter, steps, *_ = (cell.strip() for cell in cells.split("|"))
        assert int(resolution) == recipe["resolution"]
        assert int(steps.replace(",", "")) == recipe["steps"]
        kind = {"lora": "LoRA", "minor": "minor components"}[recipe["adapter"]["kind"]]
        assert adapter == f"{kind}, rank {recipe['adapter']['rank']}"


# --- error messages -------------------------------------------------------------------------------

INTERNAL = (
    "module 'urae' has no attribute",  # Python's own wording
    "checksum differs",  # caught
)


def message_of(node: ast.expr) -> str | None:
    """Return a text with `…` for what is filled in, or None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("%s", "…").replace("%d", "…")
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(parts)
    return None


def messages() -> list[str]:
    """Return the texts of all errors and warnings in the code."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name.endswith("Error") or name in ("warnings.warn", "logger.warning"):
                texts = [text for text in map(message_of, node.args) if text]
                found += [text for text in texts if text.count(" ") > 1]
    return found


def documented() -> list[str]:
    text = prose(ROOT / "docs" / "troubleshooting.md")
    items = re.findall(r"^- (.+?)(?=^- |^$)", text, re.MULTILINE | re.DOTALL)
    heads = (re.match(r"(?:`[^`]+`[,\s]*(?:and\s+|\(a warning\))?)+", item) for item in items)
    spans = itertools.chain(*(re.findall(r"`([^`]+)`", head[0]) for head in heads if head))
    return [" ".join(span.split()) for span in spans]


def test_every_message_is_in_troubleshooting():
    entries = documented()
    for message in messages():
        if not message.startswith(INTERNAL):
            assert any(entry in message for entry in entries), f"not in troubleshooting: {message}"


def test_troubleshooting_has_no_message_that_is_gone():
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    nodes = itertools.chain(*map(ast.walk, trees))
    texts = [text for node in nodes if isinstance(node, ast.expr) and (text := message_of(node))]
    for entry in documented():
        assert any(entry in text for text in texts), f"gone: {entry}"
