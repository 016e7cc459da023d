#!/usr/bin/env bash
# Train every parameter: `bash launch/full_finetune.sh RECIPE [settings] [--dry-run]`. See start_training.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/start_training.sh" "${1:---help}" --trained full "${@:2}"
