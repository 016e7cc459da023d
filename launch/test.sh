#!/usr/bin/env bash
# Linters, type check, tests: `bash launch/test.sh`. The default takes minutes; `--all` adds the slow, simulator, LIBERO
# and GPU tests. Other arguments go to pytest: `bash launch/test.sh tests/data -k cache`.
#
#   VLATUNE_VENV           the environment's folder     (.venv in this checkout)
#   VLATUNE_LIBERO_ASSETS  LIBERO's assets, for the tests marked `libero`
#
# Every stage runs even if one before it failed; exit code 1 if any did.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
venv=${VLATUNE_VENV:-$repo/.venv}

pytest_args=()
for argument in "$@"; do
  # An empty expression replaces the one in pyproject.toml: nothing is left out, and what cannot run says why it skips.
  if [ "$argument" = --all ]; then pytest_args+=(-m ""); else pytest_args+=("$argument"); fi
done

start=$SECONDS
bash launch/install.sh
table="$(printf '%-14s %-7s %s' install ok "$((SECONDS - start)) s")"
failed=0

export PATH="$venv/bin:$PATH"
cores=$(env -u OMP_NUM_THREADS nproc) # which otherwise answers with that variable
export OMP_NUM_THREADS=1 # the tests run side by side, one a core
if [ -z "${VLATUNE_LIBERO_ASSETS:-}" ] && [ -d "$repo/../shared/libero_assets" ]; then
  VLATUNE_LIBERO_ASSETS=$(cd "$repo/../shared/libero_assets" && pwd)
  export VLATUNE_LIBERO_ASSETS
fi

# stage NAME COMMAND…
stage() {
  local name=$1 start=$SECONDS verdict=ok
  shift
  echo
  echo "== $name"
  "$@" || { verdict=FAILED && failed=1; }
  table+="$(printf '\n%-14s %-7s %s' "$name" "$verdict" "$((SECONDS - start)) s")"
}

stage "ruff check" ruff check
stage "ruff format" ruff format --check
stage "shellcheck" shellcheck launch/*.sh .ci/run
stage "mypy" mypy
# A file's tests stay in one process: they share what is costly to set up, and launchers of two ranks do not pile up.
stage "pytest" pytest -rs --durations=10 -n "$((cores < 8 ? cores : 8))" --dist loadfile "${pytest_args[@]}"

echo
echo "$table"
exit $failed
