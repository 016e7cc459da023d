#!/usr/bin/env bash
# Train adapters alone; --lora.backbone, --lora.expert and --lora.rank say where and how large: `bash launch/lora.sh RECIPE [settings] [--dry-run]`. See start_training.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/start_training.sh" "${1:---help}" --trained lora "${@:2}"
