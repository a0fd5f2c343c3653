#!/usr/bin/env bash
# Starts this node. It connects to the SuperLink through the front, and starts the client's part of
# a run for every message. It needs client.key and ca.crt in this folder (from keys.py), and the
# commands of fedgradnorm[flower] on the PATH. It opens no port to other machines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
set -a
source ./node.env
set +a
export FLWR_HOME="$PWD/supernode-home" FEDGRADNORM_CACHE="${FEDGRADNORM_CACHE:-$PWD/cache}"
umask 077
mkdir -p "$STATE_DIR"
state_dir="$(cd "$STATE_DIR" && pwd)"
if [[ "$state_dir$SETTINGS" == *\'* ]]; then
    echo "node.env: STATE_DIR and SETTINGS: expected no ' in them, found $state_dir and $SETTINGS" >&2
    exit 2
fi
case "${LOST_STATE:=refuse}" in
refuse | newest | fresh) ;;
*)
    echo "node.env: LOST_STATE: expected refuse, newest or fresh, found $LOST_STATE" >&2
    exit 2
    ;;
esac
node="client-key='$CLIENT' state-dir='$state_dir'"
[ -z "$THREADS" ] || node+=" threads=$THREADS"
[ -z "$SETTINGS" ] || node+=" settings='$SETTINGS'"
[ "$LOST_STATE" = refuse ] || node+=" lost-state='$LOST_STATE'"
python3 clock.py "$SUPERLINK" # exits with 3 if Flower would refuse this clock
exec flower-supernode \
    --superlink "$SUPERLINK" --root-certificates ca.crt --auth-supernode-private-key client.key \
    --host 127.0.0.1 --port "$PORT" \
    --node-config "$node"
