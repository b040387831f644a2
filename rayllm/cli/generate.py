"""`rayllm generate`: answers to prompts, with the model in this process."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rayllm.cli.console import note, print_json, progress, stdout_kept_clean
from rayllm.cli.options import EngineOptions, GenerateOptions, Json, Model, expand
from rayllm.core.config import EngineConfig
from rayllm.core.errors import InvalidRequestError, ModelOutputError
from rayllm.core.types import FinishReason, SamplingParams, TokenLogprobs

if TYPE_CHECKING:  # the engine brings torch
    from rayllm.engine.outputs import CompletionOutput, RequestOutput

EXAMPLES = """
Example: `rayllm generate smollm2-135m --chat --temperature 0 --prompt "What is the capital of France?"`

Example: `echo "Once upon a time" | rayllm generate smollm2-135m --max-tokens 100`
"""


@expand
def generate(
    model: Model,
    engine: EngineOptions,
    sampling: GenerateOptions,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue; repeatable. Without it: all of stdin."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt to the model as a user's message, by its chat template.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue one or more prompts, with the model in this process: no server is needed.

    With --json, `outputs` holds `text`, `token_ids`, `finish_reason` and more of each answer, in the order of the
    prompts. Where there is one answer only, its fields are at the top level too.
    """
    params, config = sampling.params(), engine.config(model)
    prompts = prompt or [_read_stdin()]
    outputs = _run(config, prompts, params, chat=chat)
    if as_json:
        print_json(as_result(model, prompts, outputs))
    else:
        _print(prompts, outputs)
    if any(completion.finish_reason is FinishReason.ERROR for output in outputs for completion in output.outputs):
        raise ModelOutputError


def _print(prompts: list[str], outputs: "list[RequestOutput]") -> None:
    for text, output in zip(prompts, outputs, strict=True):
        for completion in output.outputs:
            if len(outputs) * len(output.outputs) > 1:
                note(f"--- {text!r} #{completion.index}")
            print(completion.text, flush=True)


def _read_stdin() -> str:
    if sys.stdin.isatty():
        note("Type the prompt, then Ctrl-D.")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise InvalidRequestError("prompt", "stdin is not UTF-8 text") from None


def _run(config: EngineConfig, prompts: list[str], params: SamplingParams, *, chat: bool) -> "list[RequestOutput]":
    with stdout_kept_clean():
        from rayllm.engine.llm import LLM

        with LLM.from_config(config) as llm, progress("generating", len(prompts)) as advance:
            inputs: list[str | list[int]] = list(prompts)
            if chat:
                inputs = [llm.tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in prompts]
            return llm.generate(inputs, params, on_output=lambda index, output: advance(1))


def as_result(model: str, prompts: list[str], outputs: "list[RequestOutput]") -> dict[str, object]:
    answers = [
        _answer(prompt, output, completion)
        for prompt, output in zip(prompts, outputs, strict=True)
        for completion in output.outputs
    ]
    only = answers[0] if len(answers) == 1 else {}
    return {"model": model, **only, "outputs": answers}


def _answer(prompt: str, output: "RequestOutput", completion: "CompletionOutput") -> dict[str, Any]:
    answer: dict[str, Any] = {
        "prompt": prompt,
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_token_ids": output.prompt_token_ids,
    }
    if completion.logprobs is not None:
        answer["logprobs"] = [_logprobs(entry) for entry in completion.logprobs]
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [_logprobs(entry) for entry in output.prompt_logprobs]
    return answer


def _logprobs(entry: TokenLogprobs | None) -> dict[str, object] | None:
    if entry is None:  # the first token of a prompt follows nothing
        return None
    return {
        "token_id": entry.token_id,
        "logprob": entry.logprob,
        "rank": entry.rank,
        "top": [list(t) for t in entry.top],
    }
