"""What training costs: against a plain loop, packed against padded, in memory, and while a checkpoint is written.

    python -m tests.train_benchmark speed                      # float32
    python -m tests.train_benchmark speed --dtype bfloat16     # float32 weights, products in bfloat16
    python -m tests.train_benchmark packing                    # needs what `make reference` installs
    python -m tests.train_benchmark memory
    python -m tests.train_benchmark saving
    python -m tests.train_benchmark sharding

`speed`: whole steps (forward, backward, norm of the gradient, clipping, AdamW) against transformers and torch's AdamW,
with autocast where ours computes in bfloat16, in turns on the same tokens. `packing`: GSM8K's questions and answers as
conversations, in rows of 512 tokens, and one in each row, padded to the longest of its micro-batch; what is counted are
tokens that are learnt from. `memory`: the loss and its gradients, with the logits held whole and without. `saving`: how
long a step waits for a save, beside a copy of what is saved. `sharding`: steps of two ranks of one thread each, beside
those of two processes that compute as much and do not talk. First steps are not counted. Prints one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore

from rayllm.eval.data import Data
from rayllm.models.hub import resolve_model
from rayllm.train.batch import MicroBatch
from rayllm.train.checkpoint import Checkpointer
from rayllm.train.config import CheckpointConfig, LayoutConfig, OptimizerConfig
from rayllm.train.data.cursor import Cursor
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.rows import Kind
from rayllm.train.saved import TrainState
from rayllm_kernels import fused_linear_cross_entropy, fused_linear_cross_entropy_reference
from tests.packed_rows import pack_rows
from tests.train_ranks import make_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
ROWS, LENGTH = 4, 512  # of a step
VOCABULARY, HIDDEN = 49152, 576  # SmolLM2's


def random_batch() -> MicroBatch:
    token_ids_BS = torch.randint(100, 40000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask_BS[:, 0] = False
    return MicroBatch(
        token_ids=token_ids_BS, loss_mask=mask_BS, document_lengths=((LENGTH,),) * ROWS, sample_ids=tuple(range(ROWS))
    )


def plain_step(directory: Path, dtype: str, batch: MicroBatch) -> Callable[[], float]:
    """A step of transformers and torch, which gives its loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        weight_decay=OPTIMIZER.weight_decay,
    )

    def step() -> float:
        with nullcontext() if dtype == "float32" else torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(input_ids=batch.token_ids, labels=batch.token_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def speed(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    batch = random_batch()
    step = make_step(directory, LayoutConfig(), OPTIMIZER, compute_dtype=arguments.dtype)
    steps = {
        "rayllm": lambda: step([batch], 1.0).loss,
        "transformers": plain_step(directory, arguments.dtype, batch),
    }
    losses = {name: [one()] for name, one in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(arguments.rounds):
        for name in (*steps,) if i % 2 else (*reversed(steps),):
            started = time.perf_counter()
            losses[name].append(steps[name]())
            seconds[name].append(time.perf_counter() - started)
    ratios = [theirs / ours for ours, theirs in zip(seconds["rayllm"], seconds["transformers"], strict=True)]
    return {
        "tokens_per_s": {name: ROWS * LENGTH / median(took) for name, took in seconds.items()},
        "losses": losses,
        "over_transformers": median(ratios),
        "by_round": ratios,
    }


def conversations(directory: Path, folder: Path, count: int) -> PackedDataset:
    from rayllm.eval.tasks.gsm8k import table
    from tests.lm_eval_reference import data_folder

    rows = [
        {
            "messages": [
                {"role": "user", "content": document.fields["question"]},
                {"role": "assistant", "content": document.fields["answer"]},
            ]
        }
        for document in Data(data_folder()).documents(table("test"))[:count]
    ]
    return PackedDataset(pack_rows(folder, directory, Kind.CHAT, rows, LENGTH))


def documents(batch: MicroBatch) -> list[tuple[Tensor, Tensor]]:
    """Tokens and mask of each that teaches something."""
    tokens_T, mask_T = batch.token_ids.flatten(), batch.loss_mask.flatten()
    parts = [slice(start, stop) for start, stop in pairwise(batch.cu_seqlens)]
    return [(tokens_T[part], mask_T[part]) for part in parts if mask_T[part].any()]


def eights(rows: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """About as many conversations at a time as 2048 tokens hold."""
    return [rows[first : first + 8] for first in range(0, len(rows), 8)]


def padded(rows: Sequence[tuple[Tensor, Tensor]]) -> MicroBatch:
    longest = max(len(tokens) for tokens, _ in rows)
    token_ids_BS = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BS = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (tokens, mask) in enumerate(rows):
        token_ids_BS[row, : len(tokens)], mask_BS[row, : len(tokens)] = tokens, mask
    lengths = tuple(tuple(filter(None, (len(tokens), longest - len(tokens)))) for tokens, _ in rows)
    return MicroBatch(
        token_ids=token_ids_BS, loss_mask=mask_BS, document_lengths=lengths, sample_ids=tuple(range(len(rows)))
    )


def packing(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        dataset = conversations(directory, Path(folder), 160)
        steps = [dataset.micro_batch(range(ROWS * i, ROWS * (i + 1))) for i in range(arguments.rounds)]
    step = make_step(directory, LayoutConfig(), OPTIMIZER, compute_dtype=arguments.dtype)
    ways = {
        "packed": [[batch] for batch in steps],
        "padded": [[padded(few) for few in eights(documents(batch))] for batch in steps],
    }
    seconds: dict[str, float] = dict.fromkeys(ways, 0.0)
    for batches in ways.values():
        step(batches[0], 1.0)
    for number in range(len(steps)):
        for name, batches in ways.items():
            started = time.perf_counter()
            step(batches[number], 1.0)
            seconds[name] += time.perf_counter() - started
    targets = sum(batch.num_targets for batch in steps)
    return {
        "learnt_tokens": targets,
        "rows_tokens": {
            name: sum(batch.token_ids.numel() for batch in chain.from_iterable(batches))
            for name, batches in ways.items()
        },
        "learnt_tokens_per_s": {name: targets / took for name, took in seconds.items()},
        "packed_over_padded": seconds["padded"] / seconds["packed"],
    }


LOSSES = {"whole logits": fused_linear_cross_entropy_reference, "fused": fused_linear_cross_entropy}


def peak_of(name: str) -> int:
    """Bytes that the process grows to beyond its inputs and a product of few rows."""
    hidden = torch.randn(ROWS * LENGTH, HIDDEN).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS * LENGTH,))
    LOSSES[name](hidden[:8], weight, targets[:8]).detach()
    before = most_bytes()
    LOSSES[name](hidden, weight, targets).backward()
    return most_bytes() - before


def most_bytes() -> int:
    """That this process has held. What `getrusage` says starts with what its parent held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def memory(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    peaks = {}
    for name in LOSSES:
        command = [sys.executable, "-c", f"from tests.train_benchmark import peak_of; print(peak_of({name!r}))"]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"peak_bytes": peaks, "fused_over_whole": peaks["fused"] / peaks["whole logits"]}


def saving(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    step, batch = make_step(directory, LayoutConfig(), OPTIMIZER, compute_dtype=arguments.dtype), random_batch()
    seconds: dict[str, list[float]] = {"copy": [], "save": [], "step": [], "step while files are written": []}

    def timed(name: str, function: Callable[[], object]) -> None:
        started = time.perf_counter()
        function()
        seconds[name].append(time.perf_counter() - started)

    def copy() -> None:
        """Of the weights, twice (once for transformers), and of both moments."""
        for name, weight in step.optimizer.weights.items():
            moments = step.optimizer.moments(name)
            for one in (weight.local, weight.local, moments["exp_avg"], moments["exp_avg_sq"]):
                one.detach().clone()

    step([batch], 1.0)
    with TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder), directory, step, step.mesh, CheckpointConfig(), "float32")
        for number in range(arguments.rounds):
            timed("copy", copy)
            timed("step", lambda: step([batch], 1.0))
            cursor = Cursor(seed=0).state
            timed("save", lambda: checkpointer.save(TrainState(step=number + 1, loss=0.0, cursor=cursor)))  # noqa: B023
            timed("step while files are written", lambda: step([batch], 1.0))
            checkpointer.wait()
        checkpointer.close()
    return {"seconds": {name: median(took) for name, took in seconds.items()}, "all": seconds}


LAYOUTS = {
    "apart": LayoutConfig(),
    "DDP": LayoutConfig(replicate=2),
    "FSDP": LayoutConfig(shard=2),
}


def two_ranks(rank: int, store: str, directory: Path, name: str, dtype: str, rounds: int) -> None:
    """Writes the seconds of each step to `store`.RANK."""
    torch.set_num_threads(1)
    layout = LAYOUTS[name]
    together = torch.distributed.FileStore(store, 2)
    dist.init_process_group(
        "gloo", store=together if layout.world > 1 else HashStore(), rank=rank % layout.world, world_size=layout.world
    )
    rows, whole = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2), random_batch()
    batch = MicroBatch(
        token_ids=whole.token_ids[rows],
        loss_mask=whole.loss_mask[rows],
        document_lengths=whole.document_lengths[rows],
        sample_ids=whole.sample_ids[rows],
    )
    step = make_step(directory, layout, OPTIMIZER, compute_dtype=dtype)
    step([batch], 1.0)
    together.add("ready", 1)
    while together.add("ready", 0) < 2:
        time.sleep(0.01)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        step([batch], 1.0)
        seconds.append(time.perf_counter() - started)
    Path(f"{store}.{rank}").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def sharding(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for name in LAYOUTS:
            store = f"{folder}/{name}"
            ranks = (store, directory, name, arguments.dtype, arguments.rounds)
            torch.multiprocessing.spawn(two_ranks, ranks, nprocs=2)
            seconds[name] = max(median(json.loads(Path(f"{store}.{rank}").read_text())) for rank in range(2))
    return {
        "tokens_per_s": {name: ROWS * LENGTH / took for name, took in seconds.items()},
        "share_of_talking": {name: 1 - seconds["apart"] / took for name, took in seconds.items()},
    }


PARTS = {"speed": speed, "packing": packing, "memory": memory, "saving": saving, "sharding": sharding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    report = {"settings": vars(arguments), "threads": torch.get_num_threads(), "load": os.getloadavg()}
    print(json.dumps(report | PARTS[arguments.part](resolve_model(arguments.model), arguments), indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
