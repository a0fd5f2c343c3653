#!/usr/bin/env bash
# Starts the SuperLink, which starts the server's part of a run and passes messages. Nodes reach it
# through front.sh. It needs ca.crt, server.crt and server.key (from keys.py), and the commands of
# fedgradnorm[flower] on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" # runs/ and state.db are in this folder
set -a
source ./superlink.env
set +a
export FLWR_HOME="$PWD/superlink-home"
umask 077
exec flower-superlink \
    --host 127.0.0.1 --port "$SUPERLINK_PORT" \
    --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \
    --enable-supernode-auth \
    --database "$PWD/state.db" # registered nodes outlive a restart
