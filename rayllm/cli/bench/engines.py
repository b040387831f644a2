"""The engines that `rayllm bench offline` can time."""

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from rayllm.cli.bench.throughput import Run
from rayllm.core.types import SamplingParams
from rayllm.engine.llm import LLM
from rayllm.models.hub import resolve_model


def rayllm_run(llm: LLM) -> Run:
    def run(prompts: list[list[int]], output_len: int) -> None:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True))

    return run


def transformers_run(model: str, dtype: str) -> Run:
    """transformers' own `generate`: greedy, one padded batch, on the device that rayllm would use."""
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    directory = resolve_model(model)
    network = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
    ).to(device)

    def run(prompts: list[list[int]], output_len: int) -> None:
        ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )

    return run
