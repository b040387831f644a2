"""One row for each scored document: the Parquet schema that runs write and reports read.

Everything that a score was made of is in its row, so that it can be checked, or scored again, without the model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayllm.eval.task import (
    Document,
    Generate,
    Generated,
    Likelihood,
    Loglikelihood,
    Request,
    Response,
    RollingLoglikelihood,
    Score,
    Task,
)

_RESPONSE = pa.struct(
    [
        pa.field("prompt", pa.string()),  # a conversation as JSON; "" for a rolling loglikelihood
        pa.field("continuation", pa.string()),  # what was scored; null for a generation
        pa.field("logprob", pa.float64()),  # nats, of all of the continuation; null for a generation
        pa.field("num_tokens", pa.int32()),  # that logprob is the sum of
        pa.field("is_greedy", pa.bool_()),
        pa.field("text", pa.string()),  # what was generated; null for a loglikelihood
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("task", pa.string()),
        pa.field("task_version", pa.string()),
        pa.field("subject", pa.string()),  # "" where the task has none
        pa.field("index", pa.int64()),  # of the document in its subject
        pa.field("target", pa.string()),  # the right answer
        pa.field("extracted", pa.string()),  # the answer read out of the responses; null where there is none
        pa.field("scores", pa.map_(pa.string(), pa.float64())),  # by metric
        pa.field("responses", pa.list_(_RESPONSE)),  # one for each continuation, or for each generated text
        pa.field("model", pa.string()),
        pa.field("weight_version", pa.string()),  # null where an endpoint does not say
        pa.field("num_fewshot", pa.int32()),
        pa.field("seed", pa.int64()),  # of the sampling; shots have a seed of their own
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What all rows of a run have in common."""

    model: str
    weight_version: str | None
    num_fewshot: int
    seed: int


def make_row(
    task: Task,
    document: Document,
    requests: Sequence[Request],
    responses: Sequence[Response],
    score: Score,
    run: RunInfo,
) -> dict[str, Any]:
    return {
        "task": task.name,
        "task_version": task.version,
        "subject": document.subject,
        "index": document.index,
        "target": task.target(document),
        "extracted": score.extracted,
        "scores": list(score.values.items()),
        "responses": [
            row
            for request, response in zip(requests, responses, strict=True)
            for row in _response_rows(request, response)
        ],
        "model": run.model,
        "weight_version": run.weight_version,
        "num_fewshot": run.num_fewshot,
        "seed": run.seed,
    }


def score_of(row: dict[str, Any]) -> Score:
    """Of a row as pyarrow reads it back."""
    return Score(values=dict(row["scores"]), extracted=row["extracted"])


def is_asked_by(row: dict[str, Any], requests: Sequence[Request]) -> bool:
    """Whether a row as pyarrow reads it back answers these requests."""
    expected = [asked for request in requests for asked in _asked(request)]
    return expected == [(response["prompt"], response["continuation"]) for response in row["responses"]]


def _asked(request: Request) -> list[tuple[str, str | None]]:
    """Prompt and continuation of each of its responses."""
    if isinstance(request, Generate):
        return [(_written_after(request), None)] * request.n
    return [_scored_text(request)]


def _response_rows(request: Request, response: Response) -> list[dict[str, Any]]:
    if isinstance(response, Likelihood):
        assert not isinstance(request, Generate)
        prompt, continuation = _scored_text(request)
        return [
            {
                "prompt": prompt,
                "continuation": continuation,
                "logprob": response.logprob,
                "num_tokens": response.num_tokens,
                "is_greedy": response.is_greedy,
                "text": None,
            }
        ]
    assert isinstance(request, Generate)
    assert isinstance(response, Generated)
    empty = {"continuation": None, "logprob": None, "num_tokens": None, "is_greedy": None}
    return [{"prompt": _written_after(request), **empty, "text": text} for text in response.texts]


def _written_after(request: Generate) -> str:
    prompt = request.prompt if isinstance(request.prompt, str) else json.dumps(request.prompt, ensure_ascii=False)
    return prompt + request.prefix


def _scored_text(request: Loglikelihood | RollingLoglikelihood) -> tuple[str, str]:
    if isinstance(request, Loglikelihood):
        return request.context, request.continuation
    return "", request.text
