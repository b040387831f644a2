"""`LLM(...).generate(...)`: the engine offline, in the shape that vLLM's users know."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Literal, Self, cast

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.core.errors import EngineUnavailableError, InvalidRequestError
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import Request, SamplingParams
from rayllm.engine.build import Prepared, build_engine, prepare, start_local
from rayllm.engine.output_processor import OutputProcessor
from rayllm.engine.outputs import CompletionOutput, OutputDelta, RequestOutput

Prompt = str | list[int]


class LLM:
    """A model for offline use: in this process for one shard, as Ray actors for several. Threads take turns.

    Raises ConfigError or CheckpointError when the model cannot be loaded. Close it (or use it as a context manager)
    to end the shards.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        max_model_len: int | None = None,
        quantize: Literal["w8a8", "w8a16"] | None = None,
        cache: CacheConfig | None = None,
        scheduler: SchedulerConfig | None = None,
    ) -> None:
        config = EngineConfig(
            model=ModelConfig(model=model, dtype=dtype, max_model_len=max_model_len, quantize=quantize),
            parallel=ParallelConfig(tensor=tensor_parallel_size, pipeline=pipeline_parallel_size),
            cache=cache or CacheConfig(),
            scheduler=scheduler or SchedulerConfig(),
        )
        self._start(prepare(config))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """As the command line and configuration files describe an engine. Its queue is not bounded here."""
        return cls.from_prepared(prepare(config))

    @classmethod
    def from_prepared(cls, prepared: Prepared) -> Self:
        """Of weights that may lie in memory."""
        llm = cls.__new__(cls)
        llm._start(prepared)
        return llm

    def _start(self, prepared: Prepared) -> None:
        unbounded = 1 << 62  # the whole work list is handed over at once
        queue = replace(prepared.config.scheduler, max_waiting_requests=unbounded, max_waiting_tokens=unbounded)
        prepared = replace(prepared, config=replace(prepared.config, scheduler=queue))
        if prepared.config.parallel.world_size == 1:
            parts = build_engine(prepared, start_local)
        else:
            from rayllm.engine.ray_executor import start_ray

            parts = build_engine(prepared, start_ray)
        self.tokenizer: Tokenizer = parts.tokenizer
        self.limits = parts.limits
        self._engine = parts.engine
        self._processor = OutputProcessor(parts.tokenizer)
        self._num_requests = 0
        self._process = os.getpid()
        self._turn = threading.RLock()
        self._generating = False
        self._closed = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_output: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts; `on_output` hears of each as it is done, with its prompt's index.

        Raises InvalidRequestError for a bad prompt before any of them is run, EngineUnavailableError when the LLM is
        closed, or used in a forked process or by its own `on_output`.
        """
        with self._turn:
            self._check_usable()
            self._generating = True
            try:
                return self._generate(prompts, sampling_params, on_output)
            finally:
                self._generating = False

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        sampling_params: SamplingParams | None = None,
    ) -> RequestOutput:
        """The answer to one conversation, by the tokenizer's own chat template."""
        return self.generate(self.tokenizer.chat(messages), sampling_params)[0]

    @property
    def preemptions(self) -> int:
        """How many times a sequence has given its KV blocks to another, to be computed anew."""
        return self._engine.scheduler.preemptions

    def close(self) -> None:
        self._closed = True
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineUnavailableError("this LLM is closed")
        if os.getpid() != self._process:
            raise EngineUnavailableError("this LLM belongs to the process that made it; make another after the fork")
        if self._generating:
            raise EngineUnavailableError("on_output may not call the LLM that calls it")

    def _generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        on_output: Callable[[int, RequestOutput], None] | None,
    ) -> list[RequestOutput]:
        requests, outputs = self._requests(_as_list(prompts), sampling_params)
        indices = {request.request_id: index for index, request in enumerate(requests)}
        for request in requests:
            self._processor.add(request)
            self._engine.add(request)
        try:
            while self._engine.has_work:
                for request_id, delta in self._processor.process(self._engine.step()):
                    if isinstance(delta.stop_reason, str):
                        self._engine.abort(request_id, delta.index)
                    _collect(outputs[request_id], delta)
                    if on_output is not None and not self._processor.is_live(request_id):
                        on_output(indices[request_id], outputs[request_id])
        finally:
            for request in requests:
                self._engine.abort(request.request_id)
                self._processor.remove(request.request_id)
        return list(outputs.values())

    def _requests(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[Request], dict[str, RequestOutput]]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequestError("sampling_params", f"{len(params)} given for {len(prompts)} prompts")
        requests: list[Request] = []
        outputs: dict[str, RequestOutput] = {}
        for prompt, prompt_params in zip(prompts, params, strict=True):
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            self.limits.check(token_ids, prompt_params)
            request_id = str(self._num_requests)
            self._num_requests += 1
            requests.append(Request(request_id=request_id, prompt_token_ids=tuple(token_ids), params=prompt_params))
            outputs[request_id] = _empty_output(request_id, prompt, token_ids, prompt_params)
        return requests, outputs


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise InvalidRequestError("prompts", f"must be a string or a list, not {type(prompts).__name__}")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("list[int]", list(prompts))]
    for prompt in prompts:
        if not isinstance(prompt, str | list):
            raise InvalidRequestError("prompts", f"must be strings or lists of token ids, not {type(prompt).__name__}")
    return cast("list[Prompt]", list(prompts))


def _empty_output(request_id: str, prompt: Prompt, token_ids: list[int], params: SamplingParams) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=list(token_ids),
        prompt_logprobs=None,
        outputs=[
            CompletionOutput(
                index=index,
                text="",
                token_ids=[],
                logprobs=None if params.logprobs is None else [],
                finish_reason=None,
                stop_reason=None,
            )
            for index in range(params.n)
        ],
        num_cached_tokens=0,
    )


def _collect(output: RequestOutput, delta: OutputDelta) -> None:
    completion = output.outputs[delta.index]
    completion.text += delta.text
    completion.token_ids += delta.token_ids
    if completion.logprobs is not None and delta.logprobs is not None:
        completion.logprobs += delta.logprobs
    completion.finish_reason = delta.finish_reason
    completion.stop_reason = delta.stop_reason
    if delta.index == 0:
        output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs is not None:
            output.prompt_logprobs = delta.prompt_logprobs
