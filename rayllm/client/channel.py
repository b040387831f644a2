"""What both clients agree on about the connection."""

CHANNEL_OPTIONS = [
    # A long prompt's log-probabilities pass gRPC's 4 MB; the server is the one that bounds its answers.
    ("grpc.max_receive_message_length", -1),
    # A proxy that was killed is back within seconds; by default gRPC soon tries every two minutes only.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


def host_and_port(target: str) -> str:
    """`grpc://localhost:9000` and `localhost:9000` are the same."""
    return target.removeprefix("grpc://").rstrip("/")
