#!/usr/bin/env bash
# Registers nodes at the running SuperLink by their public keys: all in nodes/, or those that are named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- $(ls nodes)
failed=0
for client in "$@"; do
    # A key that is registered already is refused, and that is no harm.
    server/flwr.sh supernode register "nodes/$client/client.key.pub" --name "$client" || failed=1
done
exit $failed
