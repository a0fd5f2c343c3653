#!/usr/bin/env bash
# Flower's own command line with this deployment's settings, as in: server/flwr.sh supernode list
set -euo pipefail
server="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
set -a
source "$server/superlink.env"
set +a
export FLWR_HOME="$server/flwr" # config.toml there says where the SuperLink is
exec flwr "$@"
