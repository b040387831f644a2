"""`make demo`: serve the embedded model, ask it one question over HTTP and over gRPC, compare, and shut it down.

Exits 0 only if both answers name Paris and have the same tokens, and the server leaves in good order.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

from rayllm.client import Client
from rayllm.core.types import SamplingParams
from tests.ports import free_ports

MODEL = "smollm2-135m"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
MAX_TOKENS = 32
START_TIMEOUT_S = 300.0  # a first start fetches the model
STOP_TIMEOUT_S = 60.0


def main() -> int:
    http_port, grpc_port = free_ports(2)
    with server(http_port, grpc_port):
        http_text, http_ids = ask_http(http_port)
        print(f"HTTP: {http_text}")
        grpc_text, grpc_ids = ask_grpc(grpc_port)
        print(f"gRPC: {grpc_text}")
    if "Paris" not in http_text or "Paris" not in grpc_text:
        return fail("an answer does not name Paris")
    if http_ids != grpc_ids:
        return fail(f"the answers differ: {http_ids} over HTTP, {grpc_ids} over gRPC")
    return 0


def ask_http(port: int) -> tuple[str, list[int]]:
    with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body={"return_token_ids": True},
        )
    choice = answer.choices[0]
    return choice.message.content or "", (choice.model_extra or {})["token_ids"]


def ask_grpc(port: int) -> tuple[str, list[int]]:
    with Client(f"localhost:{port}", timeout_s=120.0) as client:
        chunks = list(client.stream(MESSAGES, SamplingParams(temperature=0, max_tokens=MAX_TOKENS)))
    return "".join(chunk.text for chunk in chunks), [token_id for chunk in chunks for token_id in chunk.token_ids]


@contextmanager
def server(http_port: int, grpc_port: int, *options: str) -> Iterator[None]:
    command = [str(Path(sys.executable).with_name("rayllm")), "serve", MODEL]
    ports = ["--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    process = subprocess.Popen([*command, *ports, *options])
    try:
        wait_until_healthy(process, f"http://localhost:{http_port}/health")
        yield
        process.send_signal(signal.SIGINT)
        status = process.wait(STOP_TIMEOUT_S)
        if status != 0:
            sys.exit(fail(f"the server left with status {status}"))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5.0).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.5)
    sys.exit(fail("the server did not start"))


def fail(reason: str) -> int:
    print(f"demo: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
