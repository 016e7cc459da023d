#!/usr/bin/env bash
# Training through the deepspeed launcher, wherever this is: `bash launch/start_training.sh RECIPE [settings] [--dry-run]`.
# One machine (its GPUs, or its cores where it has none), several by HOSTFILE=…, or a SLURM job with one task a node. NUM_GPUS=… takes
# fewer of a machine's. --dry-run prints the command, the stages and DeepSpeed's configuration, and starts nothing.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="${VLATUNE_VENV:-$repo/.venv}/bin:$PATH"
if [ $# -eq 0 ] || [[ $1 == -* ]]; then
  echo "usage: bash launch/start_training.sh RECIPE [settings] [--dry-run]; \`vlatune train --help\` lists recipes" >&2
  exit 2
fi
settings=()
dry_run=
for word in "$@"; do
  if [ "$word" = --dry-run ]; then dry_run=1; else settings+=("$word"); fi
done

devices=$(python -c 'import torch; print(torch.cuda.device_count())')
launcher=(deepspeed --log_level warning)
if [ "$devices" -gt 0 ]; then
  ranks=${NUM_GPUS:-$devices}
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ -z "${HOSTFILE:-}" ] && [ "${SLURM_NNODES:-1}" -eq 1 ]; then
    # Beside --num_gpus the launcher would ignore that variable, and take the machine's first ones.
    launcher+=(--include "localhost:$(cut -d, -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
  else
    launcher+=(--num_gpus "$ranks")
  fi
else
  cores=$(env -u OMP_NUM_THREADS nproc) # which otherwise answers with that variable
  ranks=$((cores < 2 ? 1 : 2))
  # One thread a rank: left to itself each would take every core.
  launcher=(env DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 "${launcher[@]}" --num_accelerators "$ranks")
fi

nodes=1
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
  nodes=$SLURM_NNODES
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  hostfile=$(mktemp)
  while read -r host; do echo "$host slots=$ranks"; done <<<"$hosts" >"$hostfile"
  # Every task starts the ranks of its own node; nobody needs ssh.
  launcher+=(--hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "${hosts%%$'\n'*}" --master_port "${MASTER_PORT:-29500}")
elif [ -n "${HOSTFILE:-}" ]; then
  nodes=$(grep -c slots= "$HOSTFILE")
  launcher+=(--hostfile "$HOSTFILE")
else
  # Some port that is free: a second run on this machine would find DeepSpeed's default one taken.
  launcher+=(--master_port "${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}")
fi

command=("${launcher[@]}" --module vlatune.train.run "${settings[@]}")
if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
  WORLD_SIZE=$((nodes * ranks)) exec python -m vlatune.train.run "${settings[@]}" --dry-run
fi
exec "${command[@]}"
