"""Compares this machine's clock with the server's. supernode.sh calls it with the front's address.

Flower refuses the signature of a node whose clock differs too much, and gives no reason. Exit
status: 3 if Flower would refuse this node; else 0, also if the server cannot be reached or gives no
time: the node itself tries until the server is there.
"""

import http.client
import ssl
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

AHEAD, BEHIND = 5, 305
"""Seconds that Flower allows (flwr.common.constant: SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE)."""
NOTICEABLE = 2
"""Seconds that are worth a warning."""
PATIENCE = 10
"""Seconds to wait for the server."""


def main() -> None:
    """Compare, and print what is wrong."""
    server = sys.argv[1]
    try:
        least, most = difference(server)
    except (OSError, http.client.HTTPException, ValueError) as error:
        text = "the SuperLink's time is not known, so no clocks are compared"
        print(f"{text}: {server}: {error}", file=sys.stderr)
        return
    seconds = round((least + most) / 2)
    words = f"{abs(seconds)} s {'ahead of' if seconds > 0 else 'behind'} the SuperLink's"
    limits = f"Flower refuses a node that is {AHEAD} s ahead or {BEHIND} s behind"
    allowed = f"{limits}. Set it by NTP (chrony or systemd-timesyncd)"
    if least >= AHEAD or most <= -BEHIND:
        print(f"the clock of this machine is {words}: {allowed}", file=sys.stderr)
        sys.exit(3)
    if least >= NOTICEABLE or most <= -NOTICEABLE:
        print(f"warning: the clock of this machine is {words}: {allowed}", file=sys.stderr)


def difference(server: str) -> tuple[float, float]:
    """The minimum and maximum seconds by which this clock can be ahead of the server's.

    The server dates every answer, also 403, in whole seconds.

    Raises:
        OSError: the server cannot be reached, or its certificate is not from this CA.
        ValueError: the answer has no time.
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
