#!/usr/bin/env bash
# A recipe of two stages, π0.5's expert by RS-IMLE and then LoRA on the VLM as well if no other is named:
# `bash launch/two_stage.sh [RECIPE] [settings] [--dry-run]`. See start_training.sh.
set -euo pipefail
recipe=pi05_rs_imle
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  recipe=$1
  shift
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/start_training.sh" "$recipe" "$@"
