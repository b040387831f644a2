"""What both clients agree on about the connection."""

# A long prompt's log-probabilities pass gRPC's 4 MB; the server is the one that bounds its answers.
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1)]


def host_and_port(target: str) -> str:
    """`grpc://localhost:9000` and `localhost:9000` are the same."""
    return target.removeprefix("grpc://").rstrip("/")
