"""The engine in this process: likelihoods in as few tokens as the prefix cache allows, generation by continuous
batching."""

from collections.abc import Sequence
from dataclasses import replace

from rayllm.core.config import EngineConfig
from rayllm.core.errors import ConfigError
from rayllm.core.types import SamplingParams
from rayllm.engine.build import Prepared, prepare
from rayllm.engine.llm import LLM
from rayllm.engine.outputs import RequestOutput
from rayllm.eval.backend import OnResponse, Usage
from rayllm.eval.prefix_order import prefix_order
from rayllm.eval.scoring import ScoringCall, Span, SpanMaker, Tokens, add_up, scoring_calls
from rayllm.eval.task import Generate, Generated, Likelihood, Request
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.hub import resolve_model


class LocalBackend:
    """Closes the engine that it is given."""

    def __init__(
        self, llm: LLM, *, model: str, weight_version: str, max_input_tokens: int, block_size: int, step_tokens: int
    ) -> None:
        self.model = model
        self.weight_version: str | None = weight_version
        self._llm = llm
        self._max_input_tokens = max_input_tokens
        self._block_size = block_size
        self._step_tokens = step_tokens
        self._prompt_tokens = 0
        self._cached_tokens = 0

    @classmethod
    def open(cls, config: EngineConfig) -> "LocalBackend":
        """Raises ConfigError or CheckpointError when the model cannot be loaded."""
        checkpoint = Checkpoint.open(resolve_model(config.model.model))
        model = replace(config.model, model=str(checkpoint.directory), max_model_len=_max_model_len(config, checkpoint))
        prepared = prepare(replace(config, model=model))
        return cls._started(prepared, config.model.model, prepared.weights.version)

    @classmethod
    def of_held(cls, config: EngineConfig, held: Checkpoint, version: str) -> "LocalBackend":
        """Of weights in memory, which are called `version`. Raises ConfigError when they cannot be loaded so."""
        model = replace(config.model, max_model_len=_max_model_len(config, held))
        return cls._started(prepare(replace(config, model=model), held), config.model.model, version)

    @classmethod
    def _started(cls, prepared: Prepared, model: str, version: str) -> "LocalBackend":
        config, llm = prepared.config, LLM.from_prepared(prepared)
        return cls(
            llm,
            model=model,
            weight_version=version,
            max_input_tokens=min(prepared.max_model_len, llm.limits.max_request_tokens) - 1,
            block_size=config.cache.block_size,
            step_tokens=config.scheduler.max_num_batched_tokens,
        )

    @property
    def usage(self) -> Usage | None:
        return Usage(prompt_tokens=self._prompt_tokens, cached_tokens=self._cached_tokens)

    def run(self, requests: Sequence[Request], seeds: Sequence[int], on_response: OnResponse) -> None:
        spans = SpanMaker(self._llm.tokenizer, self._max_input_tokens)
        owned: list[tuple[int, Span]] = []
        num_spans: dict[int, int] = {}
        generations: list[tuple[int, Tokens, SamplingParams]] = []
        for index, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
            if isinstance(request, Generate):
                generations.append((index, self._prompt(request, spans), sampling_params(request, seed)))
                continue
            parts = spans.spans(request)
            num_spans[index] = len(parts)
            owned += [(index, part) for part in parts]
            if not parts:
                on_response(index, add_up([]))
        self._score(scoring_calls(owned), num_spans, on_response)
        self._generate(generations, on_response)

    def close(self) -> None:
        self._llm.close()

    def _score(self, calls: list[ScoringCall], num_spans: dict[int, int], on_response: OnResponse) -> None:
        order = prefix_order([call.prompt for call in calls], block_size=self._block_size, budget=self._step_tokens)
        calls = [calls[i] for i in order]
        parts: dict[int, list[Likelihood]] = {}

        def collect(index: int, output: RequestOutput) -> None:
            self._count(output)
            for owner, likelihood in calls[index].likelihoods(output):
                parts.setdefault(owner, []).append(likelihood)
                if len(parts[owner]) == num_spans[owner]:
                    on_response(owner, add_up(parts.pop(owner)))

        self._llm.generate([list(call.prompt) for call in calls], [call.params() for call in calls], on_output=collect)

    def _generate(self, generations: list[tuple[int, Tokens, SamplingParams]], on_response: OnResponse) -> None:
        prompts = [prompt for _, prompt, _ in generations]
        order = prefix_order(prompts, block_size=self._block_size, budget=self._step_tokens)

        def collect(index: int, output: RequestOutput) -> None:
            self._count(output)
            texts = tuple(completion.text for completion in output.outputs)
            on_response(generations[order[index]][0], Generated(texts=texts))

        self._llm.generate([list(prompts[i]) for i in order], [generations[i][2] for i in order], on_output=collect)

    def _prompt(self, request: Generate, spans: SpanMaker) -> Tokens:
        if isinstance(request.prompt, str):
            token_ids = spans.encode(request.prompt + request.prefix)
        else:
            tokenizer = self._llm.tokenizer
            token_ids = tokenizer.chat([{"role": role, "content": content} for role, content in request.prompt])
            if request.prefix:
                token_ids += tokenizer.encode(request.prefix, add_special_tokens=False)
        room = self._max_input_tokens + 1 - request.max_tokens
        if len(token_ids) > room:
            raise ConfigError(
                f"a prompt of {len(token_ids)} tokens and an answer of {request.max_tokens} are longer than the "
                f"context of {self._max_input_tokens}; use fewer shots, --num-fewshot, or --max-model-len"
            )
        return tuple(token_ids)

    def _count(self, output: RequestOutput) -> None:
        self._prompt_tokens += len(output.prompt_token_ids)
        self._cached_tokens += output.num_cached_tokens


def sampling_params(request: Generate, seed: int) -> SamplingParams:
    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=seed,
        max_tokens=request.max_tokens,
        stop=request.until,
    )


def _max_model_len(config: EngineConfig, checkpoint: Checkpoint) -> int:
    """One more than the model is to read, because what is predicted last counts as well; but a model that has learned
    its positions has not one more."""
    trained = checkpoint.spec.max_position_embeddings
    asked = config.model.max_model_len or trained
    return asked if checkpoint.spec.rope is None and asked >= trained else asked + 1
