"""bootstrap_gpu.sh on a machine made of stubs, the program that checks GPUs on a CPU, and the Dockerfile as far as it can be read."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from vlatune.launch.check_gpus import verify

ROOT = pathlib.Path(__file__).parents[2]

PYTHON = """#!/bin/bash
case "$*" in
  *device_count*) echo 2 ;;
  *socket*) echo 12345 ;;
  *--dry-run*) echo "python $*" >>"$CALLS" ;;
esac
"""
# The launcher with one rank, which saves when it is told to stop; the launcher itself does not survive that.
DEEPSPEED = """#!/bin/bash
echo "deepspeed $*" >>"$CALLS"
bash -c 'trap "echo saved; exit 0" TERM; echo training; while :; do sleep 0.05; done' vlatune.train.run --local_rank=0
echo "the launcher ended"
"""


class Machine:
    """A checkout with the scripts under test, and stubs for what they start."""

    def __init__(self, tmp_path: pathlib.Path) -> None:
        self.launch = tmp_path / "checkout" / "launch"
        self.bin = tmp_path / "venv" / "bin"
        self.calls_file = tmp_path / "calls"
        for folder in (self.launch, self.bin):
            folder.mkdir(parents=True)
        for script in ("bootstrap_gpu.sh", "start_training.sh"):
            shutil.copy(ROOT / "launch" / script, self.launch)
        record = '#!/bin/bash\necho "$(basename "$0") $*" >>"$CALLS"\n'
        self.write(self.launch / "install.sh", record + 'echo "torch: $VLATUNE_TORCH" >>"$CALLS"\n')
        for program in ("vlatune", "torchrun", "hf"):
            self.write(self.bin / program, record)
        self.write(self.bin / "python", PYTHON)
        self.write(self.bin / "deepspeed", DEEPSPEED)
        self.write(self.bin / "nvidia-smi", "#!/bin/bash\necho 'GPU 0: a stub'\n")
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        self.environment = {"PATH": path, "CALLS": str(self.calls_file), "VLATUNE_VENV": str(self.bin.parent)}

    def write(self, path: pathlib.Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(self.launch / "bootstrap_gpu.sh"), *words],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    for pid_file in machine.launch.parent.glob("runs/*.pid"):
        with_its_ranks = int(pid_file.read_text())
        if pathlib.Path(f"/proc/{with_its_ranks}").exists():
            os.killpg(with_its_ranks, signal.SIGKILL)


def wait_until(is_so) -> None:
    deadline = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dry_run_prints_every_command_and_runs_none(machine):
    (machine.bin / "nvidia-smi").unlink()
    finished = machine.start("pi05", "--out", "runs/my run", "--dry-run", PUSH_TO="me/policy")
    assert finished.returncode == 0, finished.stderr
    assert machine.calls == [] and not (machine.launch.parent / "runs").exists()
    settings = ["pi05", "--out", "runs/my run", "--hub.repo-id", "me/policy"]
    started = [shlex.split(line) for line in finished.stdout.splitlines() if line and line[0] not in "=*"]
    assert [words for words in started if words[0] not in ("watch:", "stop:", "resume:")] == [
        ["env", "VLATUNE_TORCH=cuda", "bash", "launch/install.sh"],
        ["vlatune", "check", "--no-render"],
        ["torchrun", "--standalone", "--nproc-per-node", "gpu", "-m", "vlatune.launch.check_gpus"],
        ["hf", "auth", "whoami"],
        ["bash", "launch/start_training.sh", *settings, "--dry-run"],
        ["setsid", "nohup", "bash", "launch/start_training.sh", *settings]
        + [f">>{machine.launch.parent}/runs/my run.log", "2>&1", "</dev/null", "&"],
    ]


def test_it_trains_in_the_background_until_it_is_told_to_stop(machine):
    finished = machine.start("tiny", "--batch-size", "8")
    assert finished.returncode == 0, finished.stderr
    log, pid_file = (machine.launch.parent / "runs" / name for name in ("tiny.log", "tiny.pid"))
    wait_until(lambda: log.exists() and "training" in log.read_text())
    training = "--module vlatune.train.run tiny --batch-size 8"
    assert machine.calls == [
        "install.sh ",
        "torch: cuda",
        "vlatune check --no-render",
        "torchrun --standalone --nproc-per-node gpu -m vlatune.launch.check_gpus",
        "python -m vlatune.train.run tiny --batch-size 8 --dry-run",
        f"deepspeed --log_level warning --num_gpus 2 --master_port 12345 {training}",
    ]
    again = machine.start("tiny", "--batch-size", "8")
    assert again.returncode == 2
    assert f"tiny is running as process {pid_file.read_text().strip()}" in again.stderr

    stop = re.search(r"^stop: +(.*') ", finished.stdout, re.MULTILINE)[1]
    subprocess.run(["bash", "-c", stop], check=True)
    wait_until(lambda: "the launcher ended" in log.read_text())
    assert "saved" in log.read_text()
    wait_until(lambda: not pathlib.Path(f"/proc/{pid_file.read_text().strip()}").exists())
    resume = re.search(r"^resume: +(.*)", finished.stdout, re.MULTILINE)[1]
    subprocess.run(["bash", "-c", resume], check=True, env=machine.environment, capture_output=True)
    wait_until(lambda: log.read_text().count("training") == 2)


def test_what_is_missing_is_one_sentence(machine):
    usage = machine.start()
    assert usage.returncode == 2 and "bash launch/bootstrap_gpu.sh RECIPE" in usage.stderr
    machine.write(machine.bin / "hf", "#!/bin/bash\nexit 1\n")
    not_logged_in = machine.start("tiny", PUSH_TO="me/policy")
    assert not_logged_in.returncode == 3
    assert "nothing can be pushed to me/policy; type: hf auth login, or leave PUSH_TO out" in not_logged_in.stderr
    machine.write(machine.bin / "nvidia-smi", "#!/bin/bash\nexit 9\n")
    without_gpu = machine.start("tiny")
    assert without_gpu.returncode == 3
    assert (
        "nvidia-smi lists no GPU here; take a machine with one and NVIDIA's driver, add --dry-run" in without_gpu.stderr
    )
    assert "deepspeed" not in "".join(machine.calls)


def test_a_device_that_multiplies_wrongly_is_refused(monkeypatch, capsys):
    cpu = torch.device("cpu")
    verify(cpu, rank=0, world_size=1, backend="gloo", side=64)
    assert "cpu (CPU): bfloat16 is right to" in capsys.readouterr().out
    multiply = torch.Tensor.__matmul__

    def broken(left, right):
        return multiply(left, right) * (1.1 if left.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    with pytest.raises(
        SystemExit, match=r"cpu \(CPU\) multiplies wrongly: bfloat16 is off by 0\.1; take another machine"
    ):
        verify(cpu, rank=0, world_size=1, backend="gloo", side=64)


def test_the_dockerfile_copies_what_is_there_and_what_is_needed():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    assert lines[0] == "# docker build -f launch/Dockerfile -t vlatune ."
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    assert all((ROOT / name).exists() for name in copied)
    folders = re.search(r"^FOLDERS = \((.*)\)$", (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    assert copied >= {folder.strip('" ') for folder in folders.split(",")}
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert any(line.startswith("USER ") and line != "USER root" for line in lines)


@pytest.mark.slow
def test_two_ranks_add_up(tmp_path):
    """As torchrun starts them, with gloo on a CPU in NCCL's place."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, torch\nfrom vlatune.launch.check_gpus import verify\n"
        "verify(torch.device('cpu'), rank=int(os.environ['RANK']), world_size=2, backend='gloo', side=64)\n"
    )
    torchrun = pathlib.Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--standalone", "--nproc-per-node", "2", program]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "gloo adds up over 2 ranks" in finished.stdout
