"""An endpoint that speaks OpenAI's HTTP API.

Of rayllm's own endpoints tokens and exact log-probabilities are asked for, from the continuation on, so that what comes
before it is found in the server's prefix cache. Other servers are asked to echo a prompt with log-probabilities; what
begins at the continuation's first character or later is the continuation.

Some servers leave the stop string in the text or know but a few: texts are cut here as well.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import httpx

from rayllm.core.errors import ConfigError, EngineUnavailableError, RayLLMError
from rayllm.eval.backend import OnResponse, Usage
from rayllm.eval.scoring import Span, SpanMaker, add_up
from rayllm.eval.task import (
    Generate,
    Generated,
    Likelihood,
    Loglikelihood,
    Request,
    Response,
    RollingLoglikelihood,
    cut,
)
from rayllm.eval.workers import in_parallel

_CONCURRENCY = 32
_MAX_TRIES = 8
_MAX_WAIT_S = 30.0
_MAX_STOPS = 4  # more are refused by OpenAI and whoever follows it
_KEY = "OPENAI_API_KEY"
_TIMEOUT = httpx.Timeout(30.0, read=600.0)


class HttpBackend:
    """Sends the key in the environment's OPENAI_API_KEY, if any.

    Raises EngineUnavailableError where nobody answers at the URL, RayLLMError for what is no such endpoint.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        limits = httpx.Limits(max_connections=_CONCURRENCY)
        key = os.environ.get(_KEY)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=self._url, headers=headers, timeout=_TIMEOUT, limits=limits)
        try:
            served = self._send("GET", "/v1/models")["data"][0]
            self.model = str(served["id"])
            self.weight_version: str | None = served.get("system_fingerprint")
        except (LookupError, TypeError, AttributeError):
            raise RayLLMError(f"{url}: lists no models; is this an OpenAI-compatible server?") from None
        self._lock = threading.Lock()  # for the counters
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._spans: SpanMaker | None = None
        if served.get("owned_by") == "rayllm":
            with self._understood():
                self._tokenizer = _RemoteTokenizer(self, served)
                # The last token of a continuation is sent too, and the server adds one of its own.
                self._spans = SpanMaker(self._tokenizer, int(served["max_model_len"]) - 2)

    @property
    def usage(self) -> Usage | None:
        if self._spans is None:
            return None
        return Usage(prompt_tokens=self._prompt_tokens, cached_tokens=self._cached_tokens)

    def run(self, requests: Sequence[Request], seeds: Sequence[int], on_response: OnResponse) -> None:
        with self._understood():
            spans = {
                index: self._spans.spans(request)
                for index, request in enumerate(requests)
                if self._spans is not None and not isinstance(request, Generate)
            }
        calls = [
            partial(self._answer, request, seed, spans.get(index))
            for index, (request, seed) in enumerate(zip(requests, seeds, strict=True))
        ]
        for index, response in in_parallel(calls, workers=_CONCURRENCY):
            on_response(index, response)

    def close(self) -> None:
        self._client.close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Tries again while the server says that it is busy."""
        return self._send("POST", path, {"model": self.model, **body})

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """What answers hold is not checked piece by piece: whatever cannot be worked with is the endpoint's fault."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError) as error:
            what = f"{type(error).__name__}: {error}"[:300]
            raise RayLLMError(f"{self._url}: gives an answer that cannot be understood ({what})") from error

    def _answer(self, request: Request, seed: int, spans: Sequence[Span] | None) -> Response:
        with self._understood():
            response = self._asked(request, seed, spans)
            if isinstance(response, Likelihood) and math.isnan(response.logprob):
                raise ValueError("a log-probability is no number")
            return response

    def _asked(self, request: Request, seed: int, spans: Sequence[Span] | None) -> Response:
        if isinstance(request, Generate):
            return self._generate(request, seed)
        if spans is not None:
            return add_up([self._score(span) for span in spans])
        if isinstance(request, RollingLoglikelihood):
            raise ConfigError(f"{self._url}: the perplexity of a text needs a model here or an endpoint of rayllm's")
        return self._score_echo(request)

    def _score(self, span: Span) -> Likelihood:
        choice = self._complete(
            {
                "prompt": [*span.context, *span.targets],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,
                "prompt_logprobs_start": len(span.context),
            }
        )[0]
        scored = choice["prompt_logprobs"][len(span.context) :]
        return add_up(
            [
                Likelihood(logprob=position["logprob"], num_tokens=1, is_greedy=position["rank"] == 1)
                for position in scored
            ]
        )

    def _score_echo(self, request: Loglikelihood) -> Likelihood:
        context = request.context.rstrip()
        body = {"prompt": request.context + request.continuation, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        logprobs = self._complete({**body, "echo": True})[0].get("logprobs")
        if not logprobs:
            raise RayLLMError(f"{self._url}: gives no log-probabilities of a prompt (echo with logprobs)")
        end = len(request.context) + len(request.continuation)
        parts = []
        rows = zip(logprobs["text_offset"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        for offset, logprob, top in rows:
            if logprob is not None and len(context) <= offset < end:
                parts.append(Likelihood(logprob=logprob, num_tokens=1, is_greedy=logprob >= max(top.values())))
        if not parts:
            raise RayLLMError(f"{self._url}: gives no log-probabilities of the end of a prompt (echo with logprobs)")
        return add_up(parts)

    def _generate(self, request: Generate, seed: int) -> Generated:
        choices = self._written(request, seed)
        if len(choices) != request.n:
            raise RayLLMError(f"{self._url}: gives {len(choices)} answers where {request.n} are asked for")
        return Generated(texts=tuple(cut(self._text(choice), request.until) for choice in choices))

    def _text(self, choice: dict[str, Any]) -> str:
        """Of a completion, or of a chat's message."""
        for text in (choice.get("text"), (choice.get("message") or {}).get("content")):
            if isinstance(text, str):
                return text
        raise RayLLMError(f"{self._url}: gives an answer without text: {str(choice)[:300]}")

    def _written(self, request: Generate, seed: int) -> list[dict[str, Any]]:
        stops = request.until if self._spans is not None else request.until[:_MAX_STOPS]
        sampling = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "n": request.n,
            "seed": seed,
            **({"stop": list(stops)} if stops else {}),
        }
        if isinstance(request.prompt, str):
            return self._complete({"prompt": request.prompt + request.prefix, **sampling})
        messages = [{"role": role, "content": content} for role, content in request.prompt]
        if not request.prefix:
            return self._choices(self.post("/v1/chat/completions", {"messages": messages, **sampling}))
        if self._spans is None:
            raise ConfigError(f"{self._url}: beginning a model's turn for it needs an endpoint of rayllm's")
        prompt = self.post("/tokenize", {"messages": messages})["tokens"]
        prompt += self._tokenizer.encode(request.prefix, add_special_tokens=False)
        return self._complete({"prompt": prompt, **sampling})

    def _complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        return self._choices(self.post("/v1/completions", body))

    def _choices(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise RayLLMError(f"{self._url}: answered without choices: {str(answer)[:300]}")
        answered_by = answer.get("system_fingerprint")
        if self._spans is not None and answered_by != self.weight_version:
            raise RayLLMError(
                f"{self._url}: its weights have changed from {self.weight_version} to {answered_by} while they were "
                "evaluated; start again, in another --output"
            )
        usage = answer.get("usage") or {}
        with self._lock:
            self._prompt_tokens += usage.get("prompt_tokens") or 0
            self._cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return sorted(choices, key=lambda choice: int(choice["index"]))

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                response = self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise EngineUnavailableError(f"{self._url}: {str(error) or type(error).__name__}") from None
            if response.status_code not in (429, 503) or attempt == _MAX_TRIES:
                break
            time.sleep(_retry_after_s(response.headers.get("retry-after", "")) * attempt)
        if response.status_code >= 400:
            raise RayLLMError(f"{self._url}{path} answered {response.status_code}: {response.text[:300]}")
        try:
            answer: object = response.json()
        except ValueError:
            raise RayLLMError(f"{self._url}{path}: the answer is not JSON") from None
        if not isinstance(answer, dict):
            raise RayLLMError(f"{self._url}{path}: the answer is no object: {str(answer)[:300]}")
        return answer


def _retry_after_s(header: str) -> float:
    """Of seconds or an HTTP date; 1 where it says neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):  # a TypeError for a date without a zone
            seconds = 1.0
    return 1.0 if math.isnan(seconds) else min(max(seconds, 0.0), _MAX_WAIT_S)


class _RemoteTokenizer:
    """A rayllm endpoint's tokenizer, which leaves special tokens in what it decodes."""

    def __init__(self, backend: HttpBackend, served: dict[str, Any]) -> None:
        self._backend = backend
        self.bos_token_id: int | None = served["bos_token_id"]
        self.eos_token_id: int | None = served["eos_token_id"]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        tokens: list[int] = self._backend.post("/tokenize", body)["tokens"]
        return tokens

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        body = {"tokens": list(token_ids)}
        return str(self._backend.post("/detokenize", body)["prompt"])
