"""What HAProxy says of a replica that is gone, by either face, and how it is started."""

import json
import os
import subprocess
from pathlib import Path

from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from rayllm.serve.haproxy import mend
from rayllm.serve.local import _haproxy


def test_nothing_is_not_found_and_nothing_is_500(tmp_path: Path) -> None:
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(HAPROXY_CONFIG_TEMPLATE)
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error")
    assert HAPROXY_CONFIG_TEMPLATE.count("hdr grpc-status 5 ") == 2
    mend(configuration)
    mended = configuration.read_text()
    assert "grpc-status 5 " not in mended
    assert mended.count("grpc-status 14 ") == HAPROXY_CONFIG_TEMPLATE.count("grpc-status 14 ") + 2
    head, _, body = (tmp_path / "500.http").read_bytes().partition(b"\r\n\r\n")
    status, *headers = head.decode().splitlines()
    assert status == "HTTP/1.1 503 Service Unavailable"
    assert dict(line.split(": ") for line in headers) == {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "retry-after": "1",
    }
    assert json.loads(body)["error"]["code"] == "unavailable"


def test_what_serve_starts_is_haproxy(tmp_path: Path) -> None:
    directory = tmp_path / "node's own"
    directory.mkdir()
    (directory / "haproxy.cfg").write_text("no configuration")
    script = _haproxy(tmp_path)
    environment = os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(script)}
    command = [script, "-c", "-f", directory / "haproxy.cfg"]
    run = subprocess.run(command, capture_output=True, check=False, env=environment, timeout=60)
    assert run.returncode == 1
    assert b"parsing [" in run.stderr
    assert b"haproxy.cfg:1]" in run.stderr, "it is HAProxy that reads its configuration"
