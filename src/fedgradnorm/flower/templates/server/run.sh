#!/usr/bin/env bash
# Starts the run, or goes on with it from its checkpoint, and shows the server's log until it ends. Ctrl-C ends the showing, not the run.
# For one run alone: server/run.sh --run-config 'run-dir="runs/other" settings="train.num_rounds=20"'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec server/flwr.sh run app --stream "$@"
