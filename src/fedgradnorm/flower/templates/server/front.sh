#!/usr/bin/env bash
# Starts the front: TLS on the port that nodes reach. It passes /v1/fleet/ to the SuperLink, and
# answers all other requests with 403. It needs ca.crt, server.crt and server.key (from keys.py),
# and caddy or nginx on the PATH. Restart it after a new certificate.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
set -a
source ./superlink.env
set +a
# It writes to this folder alone.
export HOME="$PWD/front-home" XDG_CONFIG_HOME="$PWD/front-home" XDG_DATA_HOME="$PWD/front-home"
umask 077
mkdir -p front-home
address="$HOST" family=tcp4
[[ "$HOST" != *:* ]] || address="[$HOST]" family=tcp6
if command -v caddy > /dev/null; then
    export BIND="$family/$address"
    exec caddy run --config Caddyfile --adapter caddyfile
elif command -v nginx > /dev/null; then
    for line in "listen $address:$PORT ssl;" "server 127.0.0.1:$SUPERLINK_PORT "; do
        grep -qF "$line" nginx.conf && continue
        echo "nginx.conf: expected '$line', as superlink.env says" >&2
        exit 2
    done
    user="$([ "$(id -u)" != 0 ] || echo 'user root;')" # else the workers are "nobody"
    exec nginx -p "$PWD" -c "$PWD/nginx.conf" -e stderr -g "$user"
else
    echo 'front.sh: expected caddy or nginx on the PATH, found neither. To get Caddy:' \
        'pip install "fedgradnorm[front]", or the package "caddy" or "nginx" of the system' >&2
    exit 2
fi
