"""Compares this machine's clock with the SuperLink's, as the front says it. supernode.sh calls it with the front's address first.

Flower refuses the signature of a node whose clock differs too much, and gives no reason. Exit status: 3 if it would; else 0, also where the
server is not reached or says no time: the node tries by itself until it is there.
"""

import http.client
import ssl
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

AHEAD, BEHIND = 5, 305
"""Seconds that Flower allows (flwr.common.constant: SYSTEM_TIME_TOLERANCE, and that with TIMESTAMP_TOLERANCE)."""
NOTICEABLE = 2
"""Seconds that are worth a warning."""
PATIENCE = 10
"""Seconds to wait for the server."""


def main() -> None:
    """Compare, and say what is wrong."""
    server = sys.argv[1]
    try:
        least, most = difference(server)
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(
            f"the SuperLink's time is not known, so no clocks are compared: {server}: {error}",
            file=sys.stderr,
        )
        return
    seconds = round((least + most) / 2)
    words = f"{abs(seconds)} s {'ahead of' if seconds > 0 else 'behind'} the SuperLink's"
    allowed = f"Flower refuses a node that is {AHEAD} s ahead or {BEHIND} s behind. Set it by NTP (chrony or systemd-timesyncd)"
    if least >= AHEAD or most <= -BEHIND:
        print(f"the clock of this machine is {words}: {allowed}", file=sys.stderr)
        sys.exit(3)
    if least >= NOTICEABLE or most <= -NOTICEABLE:
        print(f"warning: the clock of this machine is {words}: {allowed}", file=sys.stderr)


def difference(server: str) -> tuple[float, float]:
    """The least and the most seconds that this clock can be ahead of the server's, whose answer (any, 403 too) is dated in whole seconds.

    Raises:
        OSError: the server is not reached, or its certificate is not of this CA.
        ValueError: an answer without a time.
    """
    context = ssl.create_default_context(cafile=str(Path(__file__).with_name("ca.crt")))
    connection = http.client.HTTPSConnection(server, timeout=PATIENCE, context=context)
    try:
        connection.connect()
        before = time.time()
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date")
        after = time.time()
    finally:
        connection.close()
    if date is None:
        raise ValueError("its answer has no Date")
    theirs = parsedate_to_datetime(date).timestamp()
    return before - (theirs + 1), after - theirs


if __name__ == "__main__":
    main()
