"""recipes/cluster: what starts a run on several GPUs and hosts."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from urae.cli.main import app
from urae.train import TrainResult

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "recipes" / "cluster"


@pytest.mark.parametrize(("name", "hosts"), [("one_host", 1), ("several_hosts", 2)])
def test_accelerate_reads_its_configs(name, hosts):
    config = load_config_from_file(str(CLUSTER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines, config.num_processes) == (hosts, 8 * hosts)
    assert config.distributed_type == "MULTI_GPU"
    assert config.mixed_precision == "no"


@pytest.mark.parametrize("resumes", [False, True])
def test_the_slurm_script_starts_urae(tmp_path, monkeypatch, resumes):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in {
        "scontrol": 'echo "node-a"; echo "node-b"',
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/words',
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    if resumes:
        (tmp_path / "runs" / "cluster" / "checkpoint-000200").mkdir(parents=True)
    slurm = {
        "NNODES": "2", "GPUS_ON_NODE": "4", "JOB_ID": "7", "JOB_NODELIST": "node-[a-b]",
        "CPUS_PER_TASK": "64",
    }  # fmt: skip
    subprocess.run(
        ["bash", CLUSTER / "train.sbatch"],
        cwd=tmp_path,
        env={
            "PATH": f"{commands}:{os.environ['PATH']}",
            **{f"SLURM_{key}": value for key, value in slurm.items()},
        },
        check=True,
    )
    given = (tmp_path / "words").read_text().splitlines()
    assert given[:3] == ["--cpus-per-task", "64", "torchrun"]  # srun takes none over from sbatch
    words = given[3:]
    launch = get_args_parser().parse_args(words)
    assert (launch.nnodes, launch.nproc_per_node, launch.module) == ("2", "4", True)
    assert (launch.rdzv_backend, launch.rdzv_endpoint) == ("c10d", "node-a:29500")
    assert launch.training_script == "urae"
    assert launch.shutdown_timeout == 280  # a step can take longer than torchrun's 30 s

    runs = []
    result = TrainResult(1, Path("adapter.safetensors"), True, 1)
    monkeypatch.setattr("urae.train.train", lambda config, **_: runs.append(config) or result)
    monkeypatch.chdir(ROOT)
    outcome = CliRunner().invoke(app, launch.training_script_args)
    assert outcome.exit_code == 0, outcome.output
    (config,) = runs
    assert config.context_parallel == 2
    assert config.resolution == 4096
    assert config.resume == resumes
