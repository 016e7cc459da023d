#!/usr/bin/env bash
# An environment for robot programs that ask `vlatune serve`: openpi-client, which wants numpy < 2 and so cannot share vlatune's own, with
# the simulators of pocket and LIBERO beside it and without torch: `bash launch/install_client.sh [FOLDER]`. Up to date, it does nothing.
#
#   FOLDER          the environment  (openpi-client in vlatune's own, VLATUNE_VENV or .venv)
#   VLATUNE_PYTHON  the Python it is made with  (that of vlatune's environment, or else python3)
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
own=${VLATUNE_VENV:-$repo/.venv}
client=${1:-$own/openpi-client}

stamp_text="$repo $(cat launch/install_client.sh launch/constraints.txt | cksum)"
if [ "$(cat "$client/vlatune.stamp" 2>/dev/null)" = "$stamp_text" ]; then exit 0; fi
marker=vlatune.client # made before all else, so that what was begun and broken off is known again as ours
if [ -d "$client" ] && [ ! -f "$client/$marker" ] && [ -n "$(ls -A "$client")" ]; then
  echo "vlatune: $client is not empty and was not made by launch/install_client.sh; name another folder, or remove it." >&2
  exit 2
fi

python=${VLATUNE_PYTHON:-$own/bin/python}
if [ ! -x "$python" ]; then python=$(command -v "${VLATUNE_PYTHON:-python3}"); fi
echo "installing openpi-client and the simulators into $client"
mkdir -p "$client"
touch "$client/$marker"
find "$client/" -mindepth 1 -maxdepth 1 ! -name "$marker" -exec rm -rf {} +
"$python" -m venv "$client"

# What openpi-client asks for instead of what vlatune runs with; OpenCV is the last that takes an older numpy.
pins=$client/constraints.txt
grep -Ev '^(numpy|opencv-python-headless)==' launch/constraints.txt >"$pins"
printf '%s\n' openpi-client==0.1.2 numpy==1.26.4 opencv-python-headless==4.11.0.86 >>"$pins"
pin() { grep -i "^$1==" "$pins"; }

export PIP_DISABLE_PIP_VERSION_CHECK=1
pip=("$client/bin/python" -m pip install --quiet --constraint "$pins")
"${pip[@]}" --upgrade pip setuptools wheel
"${pip[@]}" openpi-client typing_extensions # it imports the second, and does not say so
"${pip[@]}" mujoco bddl easydict gymnasium cloudpickle future numba opencv-python-headless termcolor scipy matplotlib h5py pillow tyro
"${pip[@]}" --no-deps "$(pin hf-libero)" "$(pin robosuite)"
"${pip[@]}" --no-deps --no-build-isolation --editable . # what it imports is above

"$client/bin/python" -c 'import openpi_client.websocket_client_policy, vlatune.eval.serving.robot_loop, vlatune.eval.benchmarks.libero_library'
echo "$stamp_text" >"$client/vlatune.stamp.new"
mv "$client/vlatune.stamp.new" "$client/vlatune.stamp"
echo "installed; to use it: $client/bin/python -m vlatune.eval.serving.robot_loop"
