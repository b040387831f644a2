"""`rayllm train`: one command for each recipe; the configuration is a TOML file."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayllm.cli.console import note, print_json, stdout_kept_clean
from rayllm.cli.options import Json
from rayllm.cli.units import format_bytes

if TYPE_CHECKING:  # these bring torch
    from rayllm.train.config import TrainConfig
    from rayllm.train.progress import Progress

PRETRAIN_EXAMPLES = """
Example: `rayllm train pretrain --config pretrain.toml --set optimizer.learning_rate=3e-4`
"""
SFT_EXAMPLES = """
Example: `rayllm train sft --config sft.toml --set layout.shard=4`
"""
RM_EXAMPLES = """
Example: `rayllm train rm --config rm.toml --set layout.shard=2`
"""
PPO_EXAMPLES = """
Example: `rayllm train ppo --config ppo.toml --set ppo.reward_model=runs/rm/checkpoints/step-00000500`
"""
DPO_EXAMPLES = """
Example: `rayllm train dpo --config dpo.toml --set dpo.beta=0.3 --set dpo.loss=ipo_mean`
"""
_NOTE_S = 10.0

app = typer.Typer(
    name="train",
    no_args_is_help=True,
    help="Train a model; what comes out is served as it is.",
    epilog="Example: `rayllm train pretrain --config pretrain.toml`",
)

Config = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="The configuration, TOML; `run` in it names the run's folder.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting that wins over the file's; repeatable."),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="Of a Ray cluster. Default: RAY_ADDRESS, else this machine."),
]


@app.command("pretrain", epilog=PRETRAIN_EXAMPLES)
def pretrain(config: Config, settings: Settings = None, address: Address = None, as_json: Json = False) -> None:
    """Learn every token of packed texts.

    Run again, it goes on from the run's last checkpoint. Each checkpoint is a model directory to serve or evaluate.
    """
    _train("pretrain", config, settings, address, as_json=as_json)


@app.command("sft", epilog=SFT_EXAMPLES)
def sft(config: Config, settings: Settings = None, address: Address = None, as_json: Json = False) -> None:
    """Learn the answers of packed conversations.

    Run again, it goes on from the run's last checkpoint. Each checkpoint is a model directory to serve or evaluate.
    """
    _train("sft", config, settings, address, as_json=as_json)


@app.command("rm", epilog=RM_EXAMPLES)
def rm(config: Config, settings: Settings = None, address: Address = None, as_json: Json = False) -> None:
    """Learn a reward model from preference pairs: one number for an answer, higher for the better one.

    Run again, it goes on from the run's last checkpoint. Each checkpoint is a model directory that transformers loads
    as a sequence classifier of one label.
    """
    _train("rm", config, settings, address, as_json=as_json)


@app.command("ppo", epilog=PPO_EXAMPLES)
def ppo(config: Config, settings: Settings = None, address: Address = None, as_json: Json = False) -> None:
    """Learn from the rewards that the model's own answers to packed prompts get.

    The start model is the reference that it is kept near to; `rayllm train rm` makes the reward model. Answers are
    drawn by the serving engine. Run again, it goes on from the run's last checkpoint. Each checkpoint is a model
    directory to serve or evaluate.
    """
    _train("ppo", config, settings, address, as_json=as_json)


@app.command("dpo", epilog=DPO_EXAMPLES)
def dpo(config: Config, settings: Settings = None, address: Address = None, as_json: Json = False) -> None:
    """Learn from preference pairs which answers are the better ones.

    The start model is the reference; what it says of the answers is computed before the first step and kept in the run.
    Run again, it goes on from the run's last checkpoint. Each checkpoint is a model directory to serve or evaluate.
    """
    _train("dpo", config, settings, address, as_json=as_json)


def _train(recipe: str, file: Path, settings: list[str] | None, address: str | None, *, as_json: bool) -> None:
    from rayllm.train.config_file import read_train_config
    from rayllm.train.launch import launch
    from rayllm.train.progress import read_progress
    from rayllm.train.saved import SavedRun

    config = read_train_config(file, settings or ())
    with stdout_kept_clean(), _shown(config) as show:
        launch(config, recipe, address=address, on_progress=show)
    saved, last = SavedRun(Path(config.run)).latest(), read_progress(Path(config.run))
    assert saved is not None
    assert last is not None
    if as_json:
        print_json({"checkpoint": str(saved.directory), "step": last.step, "loss": last.loss})
    else:
        print(saved.directory)


@contextlib.contextmanager
def _shown(config: "TrainConfig") -> "Iterator[Callable[[Progress], None]]":
    """A line that changes on a terminal; elsewhere one every ten seconds, and the last."""
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    status = Status(f"{config.run}: starting workers", console=console)
    noted, pace = 0.0, Pace()

    def show(progress: "Progress") -> None:
        nonlocal noted
        now = time.monotonic()
        text = _line(progress, pace.seconds_left(progress, now))
        if console.is_terminal:
            status.update(text)
        if progress.step == progress.steps or (not console.is_terminal and now - noted > _NOTE_S):
            note(text)
            noted = now

    with status if console.is_terminal else contextlib.nullcontext():
        yield show


class Pace:
    """How long a run will take by how long it has taken: by the clock, so with saves, rollouts and lost workers.

    The first step that is seen does not count where there are later ones, because it warms up.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def seconds_left(self, progress: "Progress", now: float) -> float:
        left = progress.steps - progress.step
        if self._first is None or progress.step <= self._first[0]:
            self._first = progress.step, now
            return left * progress.seconds
        step, then = self._first
        return left * (now - then) / (progress.step - step)


def _line(progress: "Progress", seconds_left: float) -> str:
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    measures = "".join(f"  {name.replace('_', ' ')} {value:.3g}" for name, value in progress.measures.items())
    speed = f"MFU {progress.mfu:.1%}" if progress.mfu is not None else f"{progress.matmul_share:.0%} of matmul rate"
    return (
        f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}{measures}"
        f"  {progress.tokens_per_second:,.0f} tokens/s  {speed}"
        f"  gradient {progress.grad_norm:.3g}  rate {progress.learning_rate:.2e}"
        f"  memory {format_bytes(progress.memory_bytes)}  left {hours}:{minutes:02}:{seconds:02}"
    )
