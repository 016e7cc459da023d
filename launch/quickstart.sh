#!/usr/bin/env bash
# The whole pipeline on the embedded benchmark, on any machine: `bash launch/quickstart.sh`.
# demonstrations → cache → training → every checkpoint in the simulator → report. Stopped, it continues where it was.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
venv=${VLATUNE_VENV:-$repo/.venv}
work=${VLATUNE_WORK:-$repo/runs/quickstart}
cores=$(env -u OMP_NUM_THREADS nproc) # which otherwise answers with that variable

episodes_per_task=75     # demonstrations
noise=0.3                # on what the expert executes, in action units: it then shows how it recovers
image_px=64              # side of the images that the policy sees
recipe=pocket            # train/recipes.py
num_steps=2400           # optimizer steps
checkpoint_every=600     # steps
selection_episodes=10    # per task and checkpoint: they choose the checkpoint
report_episodes=25       # per task, on other init states: they judge it, and its controls

stages=()
current=
# stage NAME COMMAND…: a heading, the command, its seconds for the table.
stage() {
  local start=$SECONDS
  current=$1
  shift
  printf '\n== %s\n' "$current"
  "$@"
  stages+=("$(printf '%-9s %5d s' "$current" "$((SECONDS - start))")")
  current=
}
say_where() {
  local code=$?
  if [ $code -ne 0 ] && [ -n "$current" ]; then
    printf '\nvlatune: the stage "%s" ended with exit code %d; mend what is said above and start bash launch/quickstart.sh again: it continues.\n' "$current" $code >&2
  fi
}
trap say_where EXIT

train() {
  # Some port that is free: a second run on this machine would find DeepSpeed's default one taken.
  local port launcher
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  launcher=(deepspeed --log_level warning --master_port "$port")
  if ! python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    # One thread a rank: left to itself each would take every core.
    launcher=(env DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 "${launcher[@]}" --num_accelerators "$((cores < 2 ? 1 : 2))")
  fi
  "${launcher[@]}" --module vlatune.train.run "$recipe" --cache "$work/cache" --out "$work/pocket" \
    --num-steps "$num_steps" --checkpoint-every "$checkpoint_every"
}

stage install bash launch/install.sh
export PATH="$venv/bin:$PATH"
stage check vlatune check
stage collect vlatune collect --benchmark pocket --suite pocket --episodes "$episodes_per_task" --noise "$noise" --out "$work/demos"
stage prepare vlatune prepare "$work/demos" --out "$work/cache" --image-px "$image_px"
stage train train
stage sweep vlatune sweep "$work/pocket" --controls \
  --selection-episodes "$selection_episodes" --report-episodes "$report_episodes"
stage report vlatune report "$work/pocket"

printf '\n%s\n' "== done in $SECONDS s"
printf '  %s\n' "${stages[@]}"
echo "report: $work/pocket/evaluation/report/index.html"
