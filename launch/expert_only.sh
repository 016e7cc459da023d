#!/usr/bin/env bash
# Train the action expert alone, the backbone frozen: `bash launch/expert_only.sh RECIPE [settings] [--dry-run]`. See start_training.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/start_training.sh" "${1:---help}" --trained expert "${@:2}"
