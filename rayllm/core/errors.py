"""What can go wrong, as seen by a user.

Every error that may reach a user is a `RayLLMError`. Its `code` is a stable machine-readable name; the HTTP and
gRPC edges map the code to a status and send `str(error)`, which never holds a traceback, a path of the
server or an actor id. Nothing here knows of HTTP or gRPC.
"""

from typing import ClassVar


class RayLLMError(Exception):
    """Base of every error meant for a user."""

    code: ClassVar[str] = "internal"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as it is: several are made from other arguments than their message, which alone `Exception` knows."""
        return _unpickled, (type(self), self.args, self.__dict__)


class ConfigError(RayLLMError):
    """A configuration that cannot work; raised at start-up, before weights are read."""

    code = "invalid_config"


class CheckpointError(RayLLMError):
    """A checkpoint that is missing, damaged or does not fit; the message names the file and what is wrong."""

    code = "invalid_checkpoint"

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem


class InvalidRequestError(RayLLMError):
    """A request that can never be served; `field` is the request's field at fault."""

    code = "invalid_request"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class RequestExistsError(RayLLMError):
    """A request of this id is live, and this call does not say that it takes its place."""

    code = "request_exists"


class ModelNotFoundError(RayLLMError):
    """The request names a model that this endpoint does not serve."""

    code = "model_not_found"


class PermissionDeniedError(RayLLMError):
    """The call is for operators, and does not carry their key."""

    code = "permission_denied"


class CapacityError(RayLLMError):
    """The queue is full; `retry_after_s` is when trying again makes sense."""

    code = "over_capacity"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(RayLLMError):
    """The request's deadline passed before it finished; its blocks are free."""

    code = "deadline_exceeded"


class RequestAbortedError(RayLLMError):
    """The request was aborted by its client or by an operator."""

    code = "aborted"


class ModelOutputError(RayLLMError):
    """The model gave no distribution to choose a token from: its numbers are broken, for this request at least."""

    code = "invalid_model_output"

    def __init__(self, message: str = "the model gave no finite probabilities for the next token") -> None:
        super().__init__(message)


class EngineUnavailableError(RayLLMError):
    """The engine cannot serve now (a shard was lost, or it is shutting down); the request may be retried."""

    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PromotionError(RayLLMError):
    """New weights did not take the place of the running ones, which go on as before; the message says why."""

    code = "promotion_failed"


class DataError(RayLLMError):
    """Data that is missing or has not the columns that are needed; the message says how to get it."""

    code = "invalid_data"


class TrainingError(RayLLMError):
    """Training that cannot go on, or cannot be taken up again; the message says why."""

    code = "training_failed"


class DivergedError(TrainingError):
    """Figures of a run that are no longer finite: from the same checkpoint they would be so again."""

    code = "training_diverged"


def _unpickled(kind: type[RayLLMError], args: tuple[object, ...], fields: dict[str, object]) -> RayLLMError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error
