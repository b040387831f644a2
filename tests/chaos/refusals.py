"""How long refusals take, asked for at an even pace by a process that does nothing else.

    python -m tests.chaos.refusals HOST PORT SECONDS

The load generator of a burst waits for a core itself. Prints the seconds of each refusal as a JSON list.
"""

import http.client
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.e2e.bad_input import MODEL

_EVERY_S = 0.05
_MOST_TAKEN = 20  # at a time; an answer of one token is soon there
_BODY = json.dumps({"model": MODEL, "prompt": "a long answer", "max_tokens": 1, "ignore_eos": True})


def main(host: str, port: str, seconds: str) -> None:
    own = threading.local()

    def ask() -> float | None:
        """The seconds until it was refused; None: it was taken."""
        began = time.monotonic()
        own.connection.request("POST", "/v1/completions", _BODY, {"content-type": "application/json"})
        response = own.connection.getresponse()
        response.read()
        assert response.status in (200, 429), response.status
        return time.monotonic() - began if response.status == 429 else None

    def connect() -> None:
        own.connection = http.client.HTTPConnection(host, int(port))

    with ThreadPoolExecutor(_MOST_TAKEN, initializer=connect) as threads:
        asked, end = [], time.monotonic() + float(seconds)
        while time.monotonic() < end:
            asked.append(threads.submit(ask))
            time.sleep(_EVERY_S)
    print(json.dumps([spent for each in asked if (spent := each.result()) is not None]))


if __name__ == "__main__":
    main(*sys.argv[1:])
