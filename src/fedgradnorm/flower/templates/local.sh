#!/usr/bin/env bash
# The whole deployment on this machine: the SuperLink and all nodes, until Ctrl-C. Their logs are in logs/.
# In another terminal: server/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[ -f server/server.key ] || python keys.py
mkdir -p logs
trap 'trap - EXIT; kill 0; wait' EXIT # all that it started
trap exit INT TERM
server/superlink.sh >logs/superlink.log 2>&1 &
superlink=$!
until server/flwr.sh supernode list >logs/register.log 2>&1; do
    kill -0 $superlink 2>/dev/null || { tail logs/superlink.log >&2; exit 1; }
    sleep 1
done
server/register.sh >>logs/register.log 2>&1 || true # those of an earlier start are registered already
for node in nodes/*/; do
    "${node}supernode.sh" >"logs/$(basename "$node").log" 2>&1 &
done
echo "ready: server/run.sh starts the run; Ctrl-C here stops all"
wait
