"""`urae pack`: a folder of features to shards."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from urae.cli.terminal import Verbose, build_progress, console, format_size


def pack_command(
    data_dir: Annotated[Path, typer.Argument(help="Folder with the features from `urae cache`.")],
    output: Annotated[Path, typer.Option(help="Folder for the shards and their index.")],
    shard_gib: Annotated[float, typer.Option(help="Largest size of a shard in GiB.")] = 1.0,
    verbose: Verbose = False,
) -> None:
    """Pack features into shards for a bucket or the hub; only what changed is packed again.

    A killed run continues where it stopped.
    """
    from urae.features.pack import PackConfig, pack

    with build_progress() as bar:
        task = bar.add_task("shards", total=None)
        report = pack(
            PackConfig(data_dir, output, shard_gib),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    text = (
        f"{report.num_samples} pictures, {format_size(report.num_bytes)} in {output}; shards: "
        f"{len(report.written)} written, {len(report.unchanged)} unchanged"
    )
    if report.removed:
        text += f", {len(report.removed)} files of an earlier packing removed"
    console.print("[green]done:[/]", Text(text), soft_wrap=True)
