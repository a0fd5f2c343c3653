#!/usr/bin/env bash
# Registers nodes at the running SuperLink by their public keys: all in nodes/, or the named ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- $(ls nodes)
failed=0
for client in "$@"; do
    # A key that is registered already is refused, which does no harm.
    server/flwr.sh supernode register "nodes/$client/client.key.pub" --name "$client" || failed=1
done
exit $failed
