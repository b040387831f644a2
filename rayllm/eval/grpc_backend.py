"""An endpoint of rayllm's gRPC API, asked for what the engine in this process is asked for, token by token."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from rayllm.client import Client, Generation, ModelInfo
from rayllm.core.errors import CapacityError, EngineUnavailableError, RayLLMError
from rayllm.core.types import SamplingParams
from rayllm.eval.backend import OnResponse, Usage
from rayllm.eval.local_backend import sampling_params
from rayllm.eval.scoring import ScoringCall, Span, SpanMaker, add_up, scoring_calls
from rayllm.eval.task import Generate, Generated, Likelihood, Request
from rayllm.eval.workers import in_parallel

_CONCURRENCY = 32
_MAX_TRIES = 8
_TIMEOUT_S = 600.0


class GrpcBackend:
    """Of grpc://HOST:PORT. Raises EngineUnavailableError where nobody answers there, RayLLMError for what is no such
    endpoint."""

    def __init__(self, url: str) -> None:
        self._client = Client(url, timeout_s=_TIMEOUT_S)
        try:
            info = self._client.model_info()
        except EngineUnavailableError as error:
            self._client.close()
            raise EngineUnavailableError(f"{url}: {error}", retry_after_s=error.retry_after_s) from None
        except RayLLMError as error:
            self._client.close()
            raise RayLLMError(f"{url}: {error}; is this an endpoint of rayllm's gRPC API?") from None
        self.model = info.model
        self.weight_version: str | None = info.weight_version
        self._lock = threading.Lock()  # for the counters
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._tokenizer = _RemoteTokenizer(self._client, info)
        self._spans = SpanMaker(self._tokenizer, info.max_model_len - 1)  # the server adds one of its own

    @property
    def usage(self) -> Usage | None:
        return Usage(prompt_tokens=self._prompt_tokens, cached_tokens=self._cached_tokens)

    def run(self, requests: Sequence[Request], seeds: Sequence[int], on_response: OnResponse) -> None:
        owned: list[tuple[int, Span]] = []
        generating: dict[int, Callable[[], Generated]] = {}
        num_spans: dict[int, int] = {}
        for index, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
            if isinstance(request, Generate):
                generating[index] = partial(self._generate, request, seed)
                continue
            spans = self._spans.spans(request)
            num_spans[index] = len(spans)
            owned += [(index, span) for span in spans]
            if not spans:
                on_response(index, add_up([]))
        parts: dict[int, list[Likelihood]] = {}
        scoring = [partial(self._score, call) for call in scoring_calls(owned)]
        for _, scored in in_parallel(scoring, workers=_CONCURRENCY):
            for owner, likelihood in scored:
                parts.setdefault(owner, []).append(likelihood)
                if len(parts[owner]) == num_spans[owner]:
                    on_response(owner, add_up(parts.pop(owner)))
        owners = list(generating)
        for number, generated in in_parallel(list(generating.values()), workers=_CONCURRENCY):
            on_response(owners[number], generated)

    def close(self) -> None:
        self._client.close()

    def _score(self, call: ScoringCall) -> list[tuple[int, Likelihood]]:
        return list(call.likelihoods(self._ask(call.prompt, call.params())))

    def _generate(self, request: Generate, seed: int) -> Generated:
        if isinstance(request.prompt, str):
            prompt = self._spans.encode(request.prompt + request.prefix)
        else:
            messages = [{"role": role, "content": content} for role, content in request.prompt]
            prompt = self._client.tokenize(messages, model=self.model)
            if request.prefix:
                prompt += self._tokenizer.encode(request.prefix, add_special_tokens=False)
        generation = self._ask(prompt, sampling_params(request, seed))
        return Generated(texts=tuple(output.text for output in generation.outputs))

    def _ask(self, prompt: Sequence[int], params: SamplingParams) -> Generation:
        """Tries again while the server says that it is busy."""
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                generation = self._client.generate(prompt, params, model=self.model)
                break
            except CapacityError as error:
                if attempt == _MAX_TRIES:
                    raise
                time.sleep(min(error.retry_after_s, 30.0) * attempt)
        if generation.weight_version != self.weight_version:
            raise RayLLMError(
                f"{self.model}: the endpoint's weights have changed from {self.weight_version} to "
                f"{generation.weight_version} while they were evaluated; start again, in another --output"
            )
        with self._lock:
            self._prompt_tokens += generation.usage.prompt
            self._cached_tokens += generation.usage.cached
        return generation


class _RemoteTokenizer:
    """The endpoint's tokenizer, which leaves special tokens in what it decodes."""

    def __init__(self, client: Client, info: ModelInfo) -> None:
        self._client = client
        self._model = info.model
        self.bos_token_id = info.bos_token_id
        self.eos_token_id = info.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._client.tokenize(text, model=self._model, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._client.detokenize(token_ids, model=self._model)
