"""Errors arrive in another process as what they were."""

import pickle

import pytest

from rayllm.core.errors import (
    CapacityError,
    CheckpointError,
    DivergedError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelOutputError,
    RayLLMError,
)


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("a/model.safetensors", "is damaged"),
        InvalidRequestError("top_p", "is not in (0, 1]"),
        CapacityError("the queue is full", retry_after_s=2.5),
        EngineUnavailableError("a shard was lost"),
        ModelOutputError(),
        DivergedError("the loss is nan"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_pickled(error: RayLLMError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
