#!/usr/bin/env bash
# From a fresh cloud machine to a training run: `bash launch/bootstrap_gpu.sh RECIPE [settings] [--dry-run]`.
# Installs, proves that every GPU computes (and all together, by NCCL), and starts launch/start_training.sh under nohup: the run goes on
# when the connection ends. Prints how to watch, stop and resume it. --dry-run prints what it would run and runs nothing.
#
#   PUSH_TO   you/name on the Hugging Face hub: every checkpoint is pushed there (`hf auth login` before, or HF_TOKEN)
#   NUM_GPUS  how many GPUs to take                            (all)
#   RUN_LOGS  where the log and the process id are written     (runs in this checkout)
#
# Exit code 3: something is missing that only the machine's owner can provide.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -eq 0 ] || [[ $1 == -* ]]; then
  echo "usage: [PUSH_TO=you/name] bash launch/bootstrap_gpu.sh RECIPE [settings] [--dry-run]" >&2
  exit 2
fi
words=()
dry_run=
for word in "$@"; do
  if [ "$word" = --dry-run ]; then dry_run=1; else words+=("$word"); fi
done
again="$(printf '%q ' bash "$repo/launch/bootstrap_gpu.sh" "${words[@]}")"
name=${words[0]}
for ((k = 1; k < ${#words[@]}; k++)); do # a run is called by its folder, where it has one of its own
  case ${words[k]} in
    --out) name=$(basename "${words[k + 1]:-$name}") ;;
    --out=*) name=$(basename "${words[k]#--out=}") ;;
  esac
done
if [ -n "${PUSH_TO:-}" ]; then
  words+=(--hub.repo-id "$PUSH_TO")
  again="PUSH_TO=$PUSH_TO $again"
fi

needs_owner() {
  echo "vlatune: $1" >&2
  exit 3
}
# stage HEADING COMMAND…: run it, or only print it.
stage() {
  printf '\n== %s\n' "$1"
  shift
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

if [ -z "$dry_run" ] && ! nvidia-smi -L 2>/dev/null | grep GPU >/dev/null; then
  needs_owner "nvidia-smi lists no GPU here; take a machine with one and NVIDIA's driver, add --dry-run to see what would be run, or train on the CPU with bash launch/start_training.sh ${words[0]}"
fi
cd "$repo"
logs=${RUN_LOGS:-$repo/runs}
log=$logs/$name.log
pid_file=$logs/$name.pid
if [ -z "$dry_run" ] && [ -f "$pid_file" ] && kill -0 "$(cat "$pid_file")" 2>/dev/null; then
  echo "vlatune: $name is running as process $(cat "$pid_file") (log: $log); stop it first, or give this run another --out." >&2
  exit 2
fi

export PATH="${VLATUNE_VENV:-$repo/.venv}/bin:$PATH"
stage "install" env VLATUNE_TORCH=cuda bash launch/install.sh
stage "check" vlatune check --no-render # training draws nothing
stage "every GPU, and all together" torchrun --standalone --nproc-per-node "${NUM_GPUS:-gpu}" -m vlatune.launch.check_gpus
if [ -n "${PUSH_TO:-}" ]; then
  stage "the hub" hf auth whoami || needs_owner "nothing can be pushed to $PUSH_TO; type: hf auth login, or leave PUSH_TO out"
fi
stage "what will be trained" bash launch/start_training.sh "${words[@]}" --dry-run

training=(setsid nohup bash launch/start_training.sh "${words[@]}") # a session of its own: `pkill -s` finds the ranks by it
printf '\n== training\n'
if [ -n "$dry_run" ]; then
  pid=PID
  printf '%q ' "${training[@]}"
  echo ">>$(printf '%q' "$log") 2>&1 </dev/null &"
else
  mkdir -p "$logs"
  "${training[@]}" >>"$log" 2>&1 </dev/null &
  pid=$!
  echo "$pid" >"$pid_file"
  echo "started as process $pid"
fi
# The ranks alone are told to stop: the launcher would give them half a minute, which is too little for a large checkpoint.
cat <<SAY
watch:   tail -f $(printf '%q' "$log")
stop:    pkill -TERM -s $pid -f 'vlatune.train.run --local_rank'    (it saves a checkpoint and ends)
resume:  $again
SAY
