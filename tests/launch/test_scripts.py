"""The shell scripts, run on a machine made of stubs: no network, no root, nothing installed."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])
CPU_REPORT = '{"install": [{"metadata": {"name": "torch", "version": "2.13.0+cpu", "requires_dist": []}}]}'
CUDA_REPORT = '{"install": [{"metadata": {"version": "2.13.0", "requires_dist": ["nvidia-nccl-cu13==2.29.7"]}}]}'

# A Python that answers the installer's questions, makes environments of copies of itself, and writes down the rest.
PYTHON = """#!/bin/bash
case "$*" in
  *"sys.version_info <"*) exit 0 ;;
  *version_info*) echo 3.11 ;;
  "-m venv"*) mkdir -p "${@: -1}/bin"; touch "${@: -1}/pyvenv.cfg"; cp "$0" "${@: -1}/bin/python"
    for tool in vlatune deepspeed; do cp "$STUBS/$tool" "${@: -1}/bin/"; done ;;
  *"--dry-run"*) echo "dry-run $*" >>"$CALLS"; cat "$STUBS/report.json" ;;
  "-m pip"*) echo "pip $*" >>"$CALLS"; [ ! -e "$STUBS/pip_fails" ] || { echo "no such package"; exit 1; } ;;
  *choose_torch.py*) exec "$REAL_PYTHON" "$@" ;;
  *cuda.is_available*) exit 1 ;;
  *socket*) echo 12345 ;;
esac
"""
RECORD = '#!/bin/bash\necho "$(basename "$0") $*" >>"$CALLS"\n'


class Machine:
    """Stub programs in front of the real ones."""

    def __init__(self, tmp_path: Path) -> None:
        self.stubs = tmp_path / "stubs"
        self.stubs.mkdir()
        self.calls_file = tmp_path / "calls"
        self.calls_file.touch()
        self.venv = tmp_path / "venv"
        self.environment = {
            "PATH": f"{self.stubs}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "STUBS": str(self.stubs),
            "CALLS": str(self.calls_file),
            "REAL_PYTHON": shutil.which("python3") or "python3",
            "VLATUNE_VENV": str(self.venv),
            "VLATUNE_PYTHON": str(self.stubs / "python"),
            "VLATUNE_WORK": str(tmp_path / "work"),
        }
        self.write("python", PYTHON)
        self.write("nvidia-smi", "#!/bin/bash\nexit 9\n")
        # More lines than a pipe holds: a reader that stops at the first match must not look like a failure.
        self.write("ldconfig", "#!/bin/bash\necho libOSMesa.so.8\nexec seq 50000\n")
        self.write("id", "#!/bin/bash\necho 1000\n")
        self.write("sudo", "#!/bin/bash\nexit 1\n")
        for recorder in ("apt-get", "vlatune", "deepspeed"):
            self.write(recorder, RECORD)
        (self.stubs / "report.json").write_text(CPU_REPORT)

    def write(self, name: str, text: str) -> None:
        (self.stubs / name).write_text(text)
        (self.stubs / name).chmod(0o755)

    def start(self, script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(ROOT / "launch" / script)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def calls(self, program: str) -> list[str]:
        """What each call of the program was given."""
        lines = self.calls_file.read_text().splitlines()
        return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_runs_what_a_person_runs():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert 'launch/test.sh" --all' in (ROOT / ".ci" / "run").read_text()


def test_install_is_lean_and_pinned(machine):
    run = machine.start("install.sh")
    assert run.returncode == 0, run.stderr
    pip = machine.calls("pip")
    assert all("--constraint launch/constraints.txt" in call for call in pip)
    assert any(call.endswith(" torch==2.13.0") for call in pip)
    assert any("--no-deps hf-libero==0.1.4 robosuite==1.4.0" in call for call in pip)
    assert any("--no-build-isolation deepspeed==0.19.8" in call for call in pip)
    assert pip[-1].endswith("--editable .[sim,dev,export]")
    assert "torchvision" not in " ".join(pip)


def test_second_install_does_nothing_and_a_new_checkout_file_starts_it_again(machine):
    assert machine.start("install.sh").returncode == 0
    before = machine.calls_file.read_text()
    again = machine.start("install.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.calls_file.read_text() == before
    (machine.venv / "vlatune.stamp").write_text("of another setup.py")
    assert "installed in" in machine.start("install.sh").stdout


def test_cuda_build_is_replaced_without_a_gpu(machine):
    (machine.stubs / "report.json").write_text(CUDA_REPORT)
    assert machine.start("install.sh").returncode == 0
    torch = [call for call in machine.calls("pip") if " torch==" in call]
    assert len(torch) == 1
    assert torch[0].endswith("torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu")


def test_cuda_build_beside_a_gpu(machine):
    machine.write("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H200'\n")
    (machine.stubs / "report.json").write_text(CUDA_REPORT)
    assert machine.start("install.sh").returncode == 0
    assert next(call for call in machine.calls("pip") if " torch==" in call).endswith(" torch==2.13.0")
    assert machine.calls("dry-run") == []


def test_failed_stage_says_so_and_is_not_taken_for_done(machine):
    (machine.stubs / "pip_fails").touch()
    run = machine.start("install.sh")
    assert run.returncode == 1
    assert "no such package" in run.stderr
    assert "the stage 'pip' failed" in run.stderr
    assert not (machine.venv / "vlatune.stamp").exists()


def test_no_python(machine):
    run = machine.start("install.sh", VLATUNE_PYTHON="/no/such/python")
    assert run.returncode == 3
    assert run.stderr.startswith("vlatune: no Python 3.11, 3.12 or 3.13 among /no/such/python; install one")
    assert "sudo apt-get install -y python3.11" in run.stderr
    assert run.stderr.count("\n") == 1


def test_missing_library_without_permission(machine):
    machine.write("ldconfig", "#!/bin/bash\n")
    run = machine.start("install.sh")
    assert run.returncode == 3
    assert "type: sudo apt-get update && sudo apt-get install -y libosmesa6" in run.stderr
    assert run.stderr.count("\n") == 1
    assert machine.calls("apt-get") == []


def test_egl_in_its_place(machine):
    machine.write("ldconfig", "#!/bin/bash\necho libEGL.so.1\n")
    assert machine.start("install.sh").returncode == 3
    assert machine.start("install.sh", MUJOCO_GL="egl").returncode == 0


@pytest.mark.parametrize("who", ["root", "sudo"])
def test_missing_library_with_permission(machine, who):
    machine.write("ldconfig", "#!/bin/bash\n")
    if who == "root":
        machine.write("id", "#!/bin/bash\necho 0\n")
    else:
        machine.write("sudo", '#!/bin/bash\n[ "$1" = -n ] && shift\nexec "$@"\n')
    run = machine.start("install.sh", CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    assert machine.calls("apt-get") == ["-qq update", "-qq install -y --no-install-recommends g++ libosmesa6"]


def test_a_distribution_without_osmesa_gets_mesas_egl(machine):
    machine.write("ldconfig", "#!/bin/bash\n")
    machine.write("id", "#!/bin/bash\necho 0\n")
    installed = machine.venv.parent / "installed"
    machine.write("apt-get", f'#!/bin/bash\n[[ "$*" != *libosmesa6* ]] || exit 100\necho "$*" >>{installed}\n')
    assert machine.start("install.sh").returncode == 0
    assert installed.read_text().splitlines()[-1].endswith("libegl1 libegl-mesa0 libgl1-mesa-dri")


def test_apt_that_fails_ends_in_the_sentence(machine):
    machine.write("ldconfig", "#!/bin/bash\n")
    machine.write("id", "#!/bin/bash\necho 0\n")
    machine.write("apt-get", "#!/bin/bash\necho 'E: Unable to locate package'\nexit 100\n")
    run = machine.start("install.sh")
    assert run.returncode == 3
    assert "E: Unable to locate package" in run.stderr
    assert "the system packages libosmesa6 are missing" in run.stderr


def test_a_folder_that_is_no_environment_is_left_alone(machine):
    machine.venv.mkdir()
    (machine.venv / "thesis.tex").touch()
    run = machine.start("install.sh")
    assert run.returncode == 2
    assert "is not a virtual environment and not empty; name another folder with VLATUNE_VENV" in run.stderr
    assert (machine.venv / "thesis.tex").exists()


def test_unknown_kind_of_torch(machine):
    run = machine.start("install.sh", VLATUNE_TORCH="gpu")
    assert (run.returncode, run.stderr) == (2, "vlatune: VLATUNE_TORCH is 'gpu' and must be cpu or cuda.\n")


@pytest.fixture
def quickstart(machine: Machine) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    return lambda: machine.start("quickstart.sh")


def test_quickstart_runs_the_pipeline_in_order(machine, quickstart):
    run = quickstart()
    assert run.returncode == 0, run.stderr
    assert [call.split()[0] for call in machine.calls("vlatune")] == ["check", "collect", "prepare", "sweep", "report"]
    ranks = min(2, len(os.sched_getaffinity(0)))
    assert f"--num_accelerators {ranks} --module vlatune.train.run pocket" in machine.calls("deepspeed")[0]
    table = run.stdout[run.stdout.index("== done") :]
    for stage in ("install", "check", "collect", "prepare", "train", "sweep", "report"):
        assert f"\n  {stage} " in table
    assert run.stdout.endswith("work/pocket/evaluation/report/index.html\n")


def test_quickstart_speaks_the_commands_options(machine, quickstart):
    """Each stage's words are read by the parser that will read them."""
    import tyro

    from vlatune.data.prepare import PrepareConfig
    from vlatune.eval.collect import Collect
    from vlatune.eval.sweep import SweepConfig
    from vlatune.train.recipes import load_recipe

    assert quickstart().returncode == 0
    words = {call.split()[0]: call.split()[1:] for call in machine.calls("vlatune")}
    collect = tyro.cli(Collect, args=words["collect"])
    prepare = tyro.cli(PrepareConfig, args=words["prepare"])
    assert collect.out == prepare.demos
    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
    sweep = tyro.cli(positional(SweepConfig), args=words["sweep"])
    _, recipe, *settings = machine.calls("deepspeed")[0].partition("vlatune.train.run")[2].split(" ")
    default = load_recipe(recipe)
    train = tyro.cli(tyro.conf.AvoidSubcommands[type(default)], default=default, args=settings)
    assert (train.cache, sweep.runs) == (prepare.out, (train.out,))
    assert train.num_steps % train.checkpoint_every == 0
    assert train.policy.backbone.vision.image_px == prepare.image_px
    assert sweep.controls


def test_quickstart_that_stops_says_where(machine, quickstart):
    machine.write("vlatune", RECORD + '[ "$1" != prepare ] || exit 2\n')
    run = quickstart()
    assert run.returncode == 2
    assert 'the stage "prepare" ended with exit code 2' in run.stderr
    assert machine.calls("deepspeed") == []
