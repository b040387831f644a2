"""What can go wrong with a group of shards. Messages are one line and name the rank, the node or the resource."""

from typing import NamedTuple


class ClusterError(Exception):
    """Base of every error of this package."""


class SessionError(ClusterError):
    """Ray could not be started, or the cluster could not be reached."""


class PlacementError(ClusterError):
    """The cluster cannot hold the shards; the message says what is asked for and what exists."""


class HandshakeError(ClusterError):
    """The other end is not a member of this group and epoch."""


class FrameError(ClusterError):
    """Bytes that are no frame of this epoch, or a frame larger than allowed. The channel is of no use any more."""


class PeerClosedError(ClusterError):
    """The other end of the channel is gone."""


class PeerUnreachableError(PeerClosedError):
    """The other end may be there, but its node does not answer; the message is the system's."""


class RemoteError(NamedTuple):
    """An exception in a shard, by name: `type` is its class, so that a caller may raise its own class again."""

    type: str
    message: str

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type

    @classmethod
    def of(cls, error: BaseException) -> "RemoteError":
        """`message` on one line: the first of the exception's that is not empty."""
        lines = (line.strip() for line in str(error).splitlines())
        return cls(type(error).__name__, next((line for line in lines if line), ""))

    def encode(self) -> bytes:
        return f"{self.type}\n{self.message}".encode(errors="replace")

    @classmethod
    def decode(cls, payload: bytes) -> "RemoteError":
        name, _, message = payload.decode(errors="replace").partition("\n")
        return cls(name, message)


class ShardLostError(ClusterError):
    """A shard died, was stopped, stalled or failed, and with it the whole group.

    `error`: what the shard's handler raised, if so. `detection_s`: at most so long after the fault was it noticed; the
    group sets it.
    """

    def __init__(self, rank: int, cause: str, *, error: RemoteError | None = None) -> None:
        super().__init__(f"shard {rank}: {cause}")
        self.rank = rank
        self.cause = cause
        self.error = error
        self.detection_s = 0.0


class ShardStalledError(ShardLostError):
    """The shard lives, as far as is known, but did not answer in time; it may have been another that held it up."""


class GroupClosedError(ClusterError):
    """The group was closed, or is being closed by another thread."""
