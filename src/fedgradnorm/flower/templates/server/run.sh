#!/usr/bin/env bash
# Starts the run, or resumes it from its checkpoint, and shows the server's log until the run ends.
# If a run is unfinished, it shows that run. Ctrl-C ends this script, not the run. The exit status
# is 0 only if the run has completed. Settings for one run alone:
#   server/run.sh --run-config 'run-dir="runs/other" settings="train.num_rounds=20"'
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
