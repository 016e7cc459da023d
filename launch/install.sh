#!/usr/bin/env bash
# Everything vlatune needs, into a virtual environment: `bash launch/install.sh`. Started again it does what is left;
# with nothing left it takes a fraction of a second. quickstart.sh and test.sh start it first.
#
#   VLATUNE_VENV    the environment's folder          (.venv in this checkout)
#   VLATUNE_PYTHON  the Python it is made with        (the first of python3.11, 3.12, 3.13, python3 that fits)
#   VLATUNE_TORCH   cpu or cuda, instead of looking for a GPU (cuda: e.g. on a login node without one)
#   MUJOCO_GL       egl: draw with EGL, where libOSMesa is not to be had
#
# Exit code 3: something is missing that only the machine's owner can install; the sentence says what to type.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
venv=${VLATUNE_VENV:-$repo/.venv}
bin=$venv/bin

needs_owner() {
  echo "vlatune: $1" >&2
  exit 3
}

# --- which build of torch -------------------------------------------------------------------------------------------
torch_kind=${VLATUNE_TORCH:-}
if [ -z "$torch_kind" ]; then
  if nvidia-smi -L 2>/dev/null | grep GPU >/dev/null; then torch_kind=cuda; else torch_kind=cpu; fi
fi
case $torch_kind in
  cpu | cuda) ;;
  *) echo "vlatune: VLATUNE_TORCH is '$torch_kind' and must be cpu or cuda." >&2 && exit 2 ;;
esac

# --- nothing to do? -------------------------------------------------------------------------------------------------
stamp_text="$repo $torch_kind $(cat setup.py pyproject.toml launch/install.sh launch/constraints.txt launch/choose_torch.py | cksum)"
up_to_date() { [ "$(cat "$venv/vlatune.stamp" 2>/dev/null)" = "$stamp_text" ]; }
if up_to_date; then exit 0; fi

# One at a time: a second start waits here, and then finds nothing to do.
if command -v flock >/dev/null; then
  exec 9<"$repo/launch/install.sh"
  if ! flock -n 9; then
    echo "another installation is running here; waiting for it"
    flock 9
    if up_to_date; then exit 0; fi
  fi
fi

# --- a Python that fits ---------------------------------------------------------------------------------------------
fits() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; }
python=
for candidate in "$bin/python" ${VLATUNE_PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
  if fits "$candidate"; then python=$(command -v "$candidate") && break; fi
done
if [ -z "$python" ]; then
  needs_owner "no Python 3.11, 3.12 or 3.13 among ${VLATUNE_PYTHON:-python3.11, python3.12, python3.13, python3 and python}; install one (Debian, Ubuntu: sudo apt-get install -y python3.11 python3.11-venv python3.11-dev), or name one with VLATUNE_PYTHON=/path/to/python, and start again."
fi
version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')

# --- system libraries -----------------------------------------------------------------------------------------------
# Not grep -q: leaving at the first match, it would break the pipe and with it the answer.
has_library() { { ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null; } | grep -E "$1" >/dev/null; }
packages=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=("python$version-venv")
"$python" -c 'import pathlib, sysconfig; raise SystemExit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' ||
  packages+=("python$version-dev") # torch.compile and the Adam of zero2_offload are built on first use
command -v "${CXX:-c++}" >/dev/null || packages+=(g++)
# Off-screen rendering: OSMesa, or EGL beside a GPU or where it is asked for (Mesa's draws on a CPU too).
if [ "$torch_kind" = cuda ] || [ "${MUJOCO_GL:-}" = egl ]; then drawing='libOSMesa|libEGL'; else drawing=libOSMesa; fi
if [ "$(uname -s)" = Linux ] && ! has_library "$drawing"; then packages+=(libosmesa6); fi

if [ ${#packages[@]} -gt 0 ]; then
  start=$SECONDS
  sentence="the system packages ${packages[*]} are missing; type: sudo apt-get update && sudo apt-get install -y ${packages[*]} (or your system's names for them), and start again."
  if ! command -v apt-get >/dev/null; then needs_owner "$sentence"; fi
  apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq)
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || needs_owner "$sentence"
    apt=(sudo -n "${apt[@]}")
  fi
  printf '  %-44s' "system packages: ${packages[*]}"
  apt_log=$(mktemp)
  install_packages() { "${apt[@]}" install -y --no-install-recommends "$@"; }
  # Newer distributions have dropped OSMesa; Mesa's EGL draws on a CPU too.
  instead=("${packages[@]/#libosmesa6/libegl1}")
  [ "${instead[*]}" = "${packages[*]}" ] || instead+=(libegl-mesa0 libgl1-mesa-dri)
  if ! { "${apt[@]}" update && { install_packages "${packages[@]}" || install_packages "${instead[@]}"; }; } >"$apt_log" 2>&1; then
    echo failed
    tail -n 5 "$apt_log" >&2
    needs_owner "$sentence"
  fi
  rm -f "$apt_log"
  echo "$((SECONDS - start)) s"
fi

# --- the environment ------------------------------------------------------------------------------------------------
# Editors and mypy read the folders as vlatune.* through this link; some ways of copying a checkout lose it.
[ -L .links/vlatune ] || { mkdir -p .links && ln -sfn .. .links/vlatune; }

if [ -d "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
  echo "vlatune: $venv is not a virtual environment and not empty; name another folder with VLATUNE_VENV." >&2
  exit 2
fi
log=$(mktemp "${TMPDIR:-/tmp}/vlatune-install.XXXXXX")
begin=$SECONDS
echo "installing into $venv (Python $version)"

# stage NAME COMMAND…: run it quietly and print its seconds, or the end of what it said where it fails.
stage() {
  local name=$1 start=$SECONDS
  shift
  printf '  %-44s' "$name"
  echo "=== $name: $*" >>"$log"
  if ! "$@" >>"$log" 2>&1; then
    echo "failed after $((SECONDS - start)) s"
    tail -n 15 "$log" >&2
    echo "vlatune: the stage '$name' failed; mend what is said above (all of it: $log) and start bash launch/install.sh again." >&2
    exit 1
  fi
  echo "$((SECONDS - start)) s"
}

export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=("$bin/python" -m pip install --quiet --constraint launch/constraints.txt)
pin() { grep -i "^$1==" launch/constraints.txt; }

if ! fits "$bin/python"; then stage "virtual environment" "$python" -m venv --clear "$venv"; fi
stage "pip" "${pip[@]}" --upgrade pip setuptools wheel

torch_args=("$(pin torch)")
if [ "$torch_kind" = cpu ]; then # several GB of CUDA are of no use here: ask first which file pip would take
  report=$("${pip[@]}" --dry-run --no-deps --report - "$(pin torch)" 2>>"$log" || true)
  # shellcheck disable=SC2207 # one argument a line, none with spaces
  torch_args=($("$bin/python" launch/choose_torch.py "$(pin torch | cut -d= -f3)" <<<"$report"))
fi
if [ ${#torch_args[@]} -gt 0 ]; then stage "${torch_args[0]} ($torch_kind)" "${pip[@]}" "${torch_args[@]}"; fi

# DeepSpeed comes as source and asks the torch that is there; its kernels are built when they are first used.
stage "what DeepSpeed is built with" "${pip[@]}" numpy packaging psutil ninja hjson py-cpuinfo pydantic msgpack einops tqdm
stage "$(pin deepspeed)" env DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation "$(pin deepspeed)"
# Their declared requirements are wrong for us (setup.py says how); what they import is in the `sim` extra.
stage "$(pin hf-libero), $(pin robosuite)" "${pip[@]}" --no-deps "$(pin hf-libero)" "$(pin robosuite)"
stage "vlatune and the rest" "${pip[@]}" --no-build-isolation --editable '.[sim,dev,export]'

works="
import deepspeed, torch, vlatune.launch.cli, vlatune.eval.benchmarks.libero_library
if '$torch_kind' == 'cpu' and torch.version.cuda is not None:
    raise SystemExit('there is no GPU, and torch is a CUDA build; VLATUNE_TORCH=cuda keeps it')
"
stage "imports" "$bin/python" -c "$works"

echo "$stamp_text" >"$venv/vlatune.stamp.new"
mv "$venv/vlatune.stamp.new" "$venv/vlatune.stamp"
rm -f "$log"
echo "installed in $((SECONDS - begin)) s; to use it: . $bin/activate"
