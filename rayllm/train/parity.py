"""Training forward against engine: the same checkpoint and tokens, along every path that a token takes in serving.

Each layout gets two engines. One has room: prompts are computed whole, answers token by token, and a prompt that comes
again finds its beginning in the cache. The other is tight: its steps are shorter than the prompts, and its KV cache too
small for three answers at once, so that sequences are preempted. That a path was really taken is checked.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from rayllm.core.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from rayllm.core.errors import ConfigError, ModelOutputError
from rayllm.core.tokenizer import Tokenizer
from rayllm.core.types import MAX_LOGPROBS, FinishReason, SamplingParams
from rayllm.engine.llm import LLM
from rayllm.engine.model_runner import resolve_device, resolve_dtype
from rayllm.engine.outputs import RequestOutput
from rayllm.models.checkpoint import Checkpoint
from rayllm.models.quantization import Scheme
from rayllm.parallel.load import check_layout
from rayllm.train.gap import Gap, Scored, TrainingForward
from rayllm_cluster.errors import ClusterError
from rayllm_cluster.session import Session

PATHS = ("prefill", "decode_greedy", "decode_sampled", "prefix_hit", "chunked_prefill", "preemption")
INT8_SCHEMES: tuple[Scheme, ...] = ("w8a16", "w8a8")

_BLOCK = 16
_ANSWER = 40  # tokens: past two block boundaries at least
_SHORTEST = 2 * _BLOCK  # of the longest prompt: a block to share, and more than a chunk
_CHUNK = 23  # tokens of a step of the tight engine: no multiple of a block
_SIBLINGS = 3
_BUILT_IN_TOKENS = 250
_STEP_TOKENS = 4096
_SEED = 20

BUILT_IN_PROMPTS = (
    "A lighthouse keeper wrote down the weather every evening for thirty years. When the light was made automatic, he"
    " carried the notebooks to the library in the harbour town, where nobody had asked for them. A student of physics"
    " found them there much later: the wind was given in words and the height of the waves in steps of the stairs that"
    " were wet in the morning, and yet the storms could be told from each other to the hour.",
    "서울의 겨울은 길고 건조하지만, 눈이 온 다음 날 아침의 공기는 아주 맑다. 할머니는 그런 날이면 장독대의 눈을 먼저"
    " 쓸고 나서 아침밥을 지으셨다. 우리는 마루에 앉아 김이 오르는 국을 기다리며 지붕에서 떨어지는 물방울을 세었다.",
    "def merge(left: list[int], right: list[int]) -> list[int]:\n"
    '    """Merge two sorted lists into one sorted list."""\n'
    "    result, i, j = [], 0, 0\n"
    "    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n"
    "            result.append(left[i])\n"
    "            i += 1\n"
    "        else:\n",
    "The three largest cities of the country are",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What a path may differ by at most, in nats: a single token, and the mean over all."""

    max_abs_diff: float
    mean_abs_diff: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """`quantize`: None for weights as they are trained, else int8 weights made as the engine reads them."""

    tensor: int
    pipeline: int
    quantize: Scheme | None

    @property
    def name(self) -> str:
        return f"tp={self.tensor} pp={self.pipeline}" + (f" {self.quantize}" if self.quantize else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class PathResult:
    layout: Layout
    path: str
    gap: Gap
    bound: Bound

    @property
    def ok(self) -> bool:
        return self.gap.max_abs_diff <= self.bound.max_abs_diff and self.gap.mean_abs_diff <= self.bound.mean_abs_diff


# Past float32, about twice what SmolLM2-135M gives on the built-in prompts (README), int8 with bfloat16 around it.
_FLOAT32 = Bound(max_abs_diff=1e-4, mean_abs_diff=1e-4)
_HALF = Bound(max_abs_diff=1.0, mean_abs_diff=0.1)
_INT8: dict[Scheme, Bound] = {
    "w8a16": Bound(max_abs_diff=1.5, mean_abs_diff=0.2),
    "w8a8": Bound(max_abs_diff=4.0, mean_abs_diff=0.5),
}


def default_bound(dtype: torch.dtype, quantize: Scheme | None) -> Bound:
    if quantize is not None:
        return _INT8[quantize]
    return _FLOAT32 if dtype == torch.float32 else _HALF


class Parity:
    """A checkpoint whose prompts and layouts were checked, before a weight is read.

    `texts` None: built-in prompts in English, Korean and Python, cut to lengths that are no multiple of a KV block.
    Raises ConfigError for what cannot be compared, CheckpointError for what is no checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layouts: Sequence[Layout],
        *,
        dtype: str = "auto",
        texts: Sequence[str] | None = None,
    ) -> None:
        if checkpoint.int8:
            raise ConfigError(
                f"{checkpoint.directory}: is an int8 checkpoint, which cannot be trained; compare the one that it was"
                " made of, with --int8"
            )
        for layout in layouts:
            check_layout(checkpoint.spec, layout.tensor, layout.pipeline)
        self.device = resolve_device("auto")
        self.dtype = resolve_dtype(dtype, checkpoint, self.device)
        self.layouts = tuple(layouts)
        self.prompts = _prompts(checkpoint, texts)
        self._checkpoint = checkpoint

    def run(
        self, bound: float | None = None, on_result: Callable[[PathResult], None] | None = None
    ) -> list[PathResult]:
        """One result for each layout and path; `bound` replaces the default of the largest difference."""
        forward = TrainingForward(self._checkpoint, dtype=self.dtype, device=self.device)
        results = []
        with ExitStack() as stack:
            ranks = max(layout.tensor * layout.pipeline for layout in self.layouts)
            if ranks > 1:  # one Ray for all layouts
                try:
                    stack.enter_context(Session.start(num_cpus=ranks))
                except ClusterError as error:
                    raise ConfigError(str(error)) from error
            for layout in self.layouts:
                allowed = default_bound(self.dtype, layout.quantize)
                if bound is not None:
                    allowed = Bound(max_abs_diff=bound, mean_abs_diff=bound)
                for path, sequences in self._paths(layout):
                    result = PathResult(layout=layout, path=path, gap=forward.gap(sequences), bound=allowed)
                    results.append(result)
                    if on_result is not None:
                        on_result(result)
        return results

    def _paths(self, layout: Layout) -> Iterator[tuple[str, list[Scored]]]:
        lengths = [len(prompt) for prompt in self.prompts]
        blocks = sum(-(-(length + _ANSWER) // _BLOCK) + 1 for length in lengths)
        with self._engine(layout, blocks, max(max(lengths), min(sum(lengths), _STEP_TOKENS))) as llm:
            yield "prefill", self._ask(llm, prompt_logprobs=MAX_LOGPROBS, max_tokens=1)
            yield "decode_greedy", self._ask(llm, logprobs=MAX_LOGPROBS)
            yield "decode_sampled", self._ask(llm, logprobs=MAX_LOGPROBS, temperature=1.0, seed=_SEED)
            yield "prefix_hit", self._ask_again(llm)
        # The siblings share the prompt's full blocks and need three more each or four; they can all begin, not end.
        with self._engine(layout, -(-max(lengths) // _BLOCK) + 2 * _SIBLINGS, _CHUNK) as llm:
            yield "chunked_prefill", self._ask(llm, prompt_logprobs=MAX_LOGPROBS, max_tokens=1)
            yield "preemption", self._ask_for_too_much(llm)

    def _engine(self, layout: Layout, num_blocks: int, step_tokens: int) -> LLM:
        return LLM.from_config(
            EngineConfig(
                model=ModelConfig(
                    model=str(self._checkpoint.directory),
                    dtype=str(self.dtype).removeprefix("torch."),
                    quantize=layout.quantize,
                ),
                parallel=ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline),
                cache=CacheConfig(block_size=_BLOCK, num_blocks=num_blocks),
                scheduler=SchedulerConfig(max_num_batched_tokens=step_tokens, max_num_seqs=16),
            )
        )

    def _ask(
        self,
        llm: LLM,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        max_tokens: int = _ANSWER,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Scored]:
        params = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        return [part for output in llm.generate([*self.prompts], params) for part in _scored(output)]

    def _ask_again(self, llm: LLM) -> list[Scored]:
        """Prompts that the engine knows: their first half from the cache, the rest and an answer computed on it."""
        prompts = [prompt for prompt in self.prompts if len(prompt) >= _SHORTEST]
        shared = [len(prompt) // 2 // _BLOCK * _BLOCK for prompt in prompts]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=_ANSWER,
                ignore_eos=True,
                logprobs=MAX_LOGPROBS,
                prompt_logprobs=MAX_LOGPROBS,
                prompt_logprobs_start=tokens + 1,
            )
            for tokens in shared
        ]
        outputs = llm.generate([*prompts], params)
        assert [output.num_cached_tokens for output in outputs] == shared, "prompts were not taken from the cache"
        return [part for output in outputs for part in _scored(output)]

    def _ask_for_too_much(self, llm: LLM) -> list[Scored]:
        longest = max(self.prompts, key=len)
        params = SamplingParams(
            n=_SIBLINGS, temperature=1, seed=_SEED, max_tokens=_ANSWER, ignore_eos=True, logprobs=MAX_LOGPROBS
        )
        before = llm.preemptions
        (output,) = llm.generate([longest], params)
        assert llm.preemptions > before, "no sequence was preempted"
        return _scored(output)


def _prompts(checkpoint: Checkpoint, texts: Sequence[str] | None) -> list[list[int]]:
    tokenizer = Tokenizer.load(checkpoint.directory)
    context = checkpoint.spec.max_position_embeddings
    room = context - _ANSWER
    if room < _SHORTEST:
        raise ConfigError(f"the model's context of {context} tokens is too short: {_SHORTEST + _ANSWER} are needed")
    if texts is None:
        prompts = [tokenizer.encode(text)[: min(room, _BUILT_IN_TOKENS)] for text in BUILT_IN_PROMPTS]
        return [prompt[:-1] if len(prompt) % _BLOCK == 0 else prompt for prompt in prompts]
    prompts = [tokenizer.encode(text) for text in texts]
    if not prompts:
        raise ConfigError("prompts: there is none")
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > room:
            raise ConfigError(
                f"prompts: number {number} has {len(prompt)} tokens; {room} of the context of {context} are for prompts"
            )
    longest = max(map(len, prompts))
    if longest < _SHORTEST:
        raise ConfigError(
            f"prompts: the longest has {longest} tokens; {_SHORTEST} are needed to fill a KV block or two"
        )
    return prompts


def _scored(output: RequestOutput) -> list[Scored]:
    """A sequence for each answer; what was said of the prompt goes with the first."""
    said = {place: token for place, token in enumerate(output.prompt_logprobs or []) if token is not None}
    parts = []
    for completion in output.outputs:
        if completion.finish_reason is FinishReason.ERROR:
            raise ModelOutputError("the engine got no distribution to choose a token from; the weights may be damaged")
        answer = enumerate(completion.logprobs or [], start=len(output.prompt_token_ids))
        parts.append(Scored(token_ids=[*output.prompt_token_ids, *completion.token_ids], said={**said, **dict(answer)}))
        said = {}
    return parts
