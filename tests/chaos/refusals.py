"""How long refusals take, asked for one after another by a process that does nothing else.

    python -m tests.chaos.refusals HOST PORT SECONDS

The load generator of a burst waits for a core itself. Prints the seconds of each refusal as a JSON list.
"""

import http.client
import json
import sys
import time

from tests.e2e.bad_input import MODEL

_EVERY_S = 0.03


def main(host: str, port: str, seconds: str) -> None:
    connection = http.client.HTTPConnection(host, int(port))
    body = json.dumps({"model": MODEL, "prompt": "a long answer", "max_tokens": 1, "ignore_eos": True})
    refused, end = [], time.monotonic() + float(seconds)
    while (began := time.monotonic()) < end:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status in (200, 429), response.status
        if response.status == 429:
            refused.append(time.monotonic() - began)
        time.sleep(_EVERY_S)
    print(json.dumps(refused))


if __name__ == "__main__":
    main(*sys.argv[1:])
