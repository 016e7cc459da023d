"""The shell scripts that start training: what they would run, and two nodes that are one machine."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from launched import free_port, train, weights

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


def start(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VLATUNE_VENV": sys.prefix, **variables}
    command = ["bash", str(LAUNCH / script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("script", "words", "stages"),
    [
        ("full_finetune.sh", ["tiny"], ["steps 0 to 4: full, flow"]),
        pytest.param("lora.sh", ["tiny", "--lora.rank", "4"], ["steps 0 to 4: lora, flow"], marks=pytest.mark.slow),
        pytest.param("expert_only.sh", ["tiny"], ["steps 0 to 4: expert, flow"], marks=pytest.mark.slow),
        ("two_stage.sh", ["tiny_stages"], ["steps 0 to 2: expert, flow", "steps 2 to 4: lora+expert, rs_imle"]),
        pytest.param(
            "two_stage.sh",
            ["--batch-size", "8"],
            ["steps 0 to 6000: expert", "steps 6000 to 12000: lora+expert"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_dry_run_says_all(script, words, stages):
    finished = start(script, *words, "--dry-run", "--optimizer.gradient-clip-norm", "0.5")
    assert finished.returncode == 0, finished.stderr
    command, rest = finished.stdout.split("\n", 1)
    assert "deepspeed --log_level warning" in command
    assert "--module vlatune.train.run" in command
    assert "--dry-run" not in command
    for stage in stages:
        assert stage in rest
    settings = json.loads(rest[rest.index("{") :])
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["gradient_clipping"] == 0.5


def test_a_recipe_must_be_named():
    for script in ("start_training.sh", "lora.sh"):
        finished = start(script)
        assert finished.returncode == 2
        assert "usage: bash launch/start_training.sh RECIPE" in finished.stderr


def test_a_slurm_job_starts_every_nodes_own_ranks(tmp_path):
    """With a stand-in for SLURM's own command, which lists the job's hosts."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    scontrol.chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[7-8]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    finished = start("full_finetune.sh", "tiny", "--batch-size", "8", "--dry-run", PATH=path, **job)
    assert finished.returncode == 0, finished.stderr
    command = finished.stdout.splitlines()[0]
    assert "--no_ssh --node_rank 1 --master_addr node7" in command
    hostfile = pathlib.Path(command.split("--hostfile ")[1].split()[0])
    ranks = hostfile.read_text().splitlines()[0].split("slots=")[1]
    assert hostfile.read_text().splitlines() == [f"node7 slots={ranks}", f"node8 slots={ranks}"]
    assert f"on {2 * int(ranks)} ranks" in finished.stdout


@pytest.mark.slow
def test_two_nodes_over_loopback_agree_with_one(small_cache, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    port = free_port()
    deepspeed = str(pathlib.Path(sys.executable).with_name("deepspeed"))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def node(number: int, out: pathlib.Path) -> subprocess.Popen[str]:
        launcher = [deepspeed, "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", port, "--module", "vlatune.train.run"]
        command = [*launcher, "tiny", "--cache", str(small_cache.path), "--out", str(out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    nodes = [node(number, tmp_path / "two_nodes") for number in range(2)]
    for process in nodes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    train(small_cache.path, tmp_path / "one_node")
    for name, expected in weights(tmp_path / "one_node").items():
        torch.testing.assert_close(weights(tmp_path / "two_nodes")[name], expected, rtol=1e-6, atol=1e-7)
