"""What is refused before a worker starts: damaged data, tokens the model lacks, a run that would go on as another."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest

from rayllm.core.errors import ConfigError, DataError
from rayllm.train import launch as train_launch
from rayllm.train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    ScheduleConfig,
    TrainConfig,
)
from rayllm.train.data.dataset import PackedDataset
from rayllm.train.data.info import read_info
from rayllm.train.data.rows import Kind
from rayllm.train.launch import _alone, _sized, launch
from rayllm.train.progress import read_metrics, read_progress
from rayllm.train.recipes import RECIPES
from rayllm.train.saved import SavedRun
from rayllm.train.trainer import check
from tests import train_ranks
from tests.packed_rows import pack_rows
from tests.ranks import Ranks

LENGTH = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    rows = [{"text": "the cat sat on the mat. " * 4}] * 8
    return pack_rows(tmp_path_factory.mktemp("data"), tiny_model, Kind.TEXT, rows, LENGTH)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, data: Path) -> TrainConfig:
    return TrainConfig(
        run=str(tmp_path / "run"),
        model=ModelConfig(start=str(tiny_model)),
        data=DataConfig(path=str(data)),
        batch=BatchConfig(sequence_length=LENGTH, tokens=4 * LENGTH),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(steps=2, kind="constant"),
        checkpoint=CheckpointConfig(every_steps=1),
    )


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture
def trained(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    ranks.run(1, train_ranks.run_recipe, "pretrain", config)
    return config


def copied(data: Path, to: Path) -> Path:
    return Path(shutil.copytree(data, to))


def test_damaged_data(config: TrainConfig, data: Path, tmp_path: Path) -> None:
    check(config, RECIPES["pretrain"])
    damaged = copied(data, tmp_path / "damaged")
    file = damaged / read_info(damaged).files[0].name
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"^{file}: is damaged: not what was packed; pack it again$"):
        check(replace(config, data=DataConfig(path=str(damaged))), RECIPES["pretrain"])


def test_tokens_that_the_model_lacks(
    config: TrainConfig, data: Path, make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = PackedDataset(data)
    tokens = pq.read_table(data / dataset.info.files[0].name)["tokens"]
    largest = max(max(row) for row in tokens.to_pylist())
    assert dataset.largest_token() == largest

    def with_model_of(size: int) -> TrainConfig:
        model = make_tiny_model(vocab_size=size, pad_token_id=None, eos_token_id=None, bos_token_id=None)
        return replace(config, model=ModelConfig(start=str(model)))

    with pytest.raises(DataError, match=f"holds token {largest}; the model has {largest} of them, from 0"):
        check(with_model_of(largest), RECIPES["pretrain"])
    check(with_model_of(largest + 1), RECIPES["pretrain"])


def test_a_run_goes_on_as_it_began(trained: TrainConfig, data: Path, tiny_model: Path, tmp_path: Path) -> None:
    longer = replace(trained, schedule=replace(trained.schedule, steps=3))
    check(longer, RECIPES["pretrain"])
    check(replace(longer, data=DataConfig(path=str(copied(data, tmp_path / "elsewhere")))), RECIPES["pretrain"])
    rows = [{"text": "another text, as long as the one before. " * 4}] * 8
    (tmp_path / "other").mkdir()
    others = str(pack_rows(tmp_path / "other", tiny_model, Kind.TEXT, rows, LENGTH))
    for changed, problem in (
        (replace(longer, data=DataConfig(path=others)), "another data set;"),
        (replace(longer, data=replace(longer.data, seed=1)), "another data seed;"),
        (replace(longer, model=replace(longer.model, random=True)), "another start model;"),
    ):
        with pytest.raises(DataError, match=f"the run began with {problem}"):
            check(changed, RECIPES["pretrain"])
    with pytest.raises(ConfigError, match=r"schedule.steps: 1, but .* is at step 2"):
        check(replace(trained, schedule=replace(trained.schedule, steps=1)), RECIPES["pretrain"])


def test_a_checkpoint_tells_the_mean_of_the_steps_since_the_one_before(config: TrainConfig, ranks: Ranks) -> None:
    schedule = replace(config.schedule, steps=5)
    config = replace(config, schedule=schedule, checkpoint=CheckpointConfig(every_steps=3))
    ranks.run(1, train_ranks.run_recipe, "pretrain", config)
    run = Path(config.run)
    losses = [row.loss for row in read_metrics(run)]
    states = [saved.state for saved in SavedRun(run).all()]
    assert [state.loss for state in states] == pytest.approx([fmean(losses[:3]), fmean(losses[3:])])
    assert {state.reward for state in states} == {None}


def test_a_recipe_does_not_go_on_as_another(trained: TrainConfig, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat"}]}] * 8
    chat = str(pack_rows(tmp_path, tiny_model, Kind.CHAT, rows, LENGTH))
    with pytest.raises(DataError, match="the run began with another recipe and data set;"):
        check(replace(trained, data=DataConfig(path=chat)), RECIPES["sft"])


def test_one_at_a_time(config: TrainConfig) -> None:
    with _alone(config), pytest.raises(ConfigError, match=r"^run: another `rayllm train` is at work in"):
        launch(config, "pretrain")
    with _alone(config):
        pass


def test_a_folder_that_cannot_be_written(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(ConfigError, match=f"^run: {run} cannot be written: "):
            launch(replace(config, run=str(run)), "pretrain")


def test_what_a_killed_save_left(config: TrainConfig) -> None:
    checkpoints = Path(config.run) / "checkpoints"
    (checkpoints / ".step-00000001.partial" / "training").mkdir(parents=True)
    (checkpoints / ".DS_Store").write_text("not ours")
    with _alone(config):
        assert [path.name for path in checkpoints.iterdir()] == [".DS_Store"]
    SavedRun(Path(config.run)).begin(1)


def test_a_model_whose_configuration_is_no_object(config: TrainConfig, tiny_model: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(tiny_model, tmp_path / "start"))
    (start / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json: is not a JSON object$"):
        check(replace(config, model=ModelConfig(start=str(start))), RECIPES["pretrain"])


def test_a_layout_beyond_the_cluster_waits_and_says_so(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_launch, "_there_are", {"CPU": 3, "GPU": 1}.__getitem__)
    fitting, large = (replace(config, layout=LayoutConfig(shard=shard)) for shard in (2, 4))
    assert _sized(fitting) == fitting
    assert not caplog.records
    assert _sized(large) == large
    assert caplog.messages == [f"{config.run}: waiting for room for 4 workers, of which 3 have it"]


def test_progress_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / "progress.json").write_bytes(b'{"step": 1, "loss": null')
    assert read_progress(tmp_path) is None


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: OptimizerConfig(learning_rate=float("inf")), "optimizer.learning_rate: inf is not finite"),
        (lambda: OptimizerConfig(learning_rate=1.0, weight_decay=float("inf")), "optimizer.weight_decay: inf is not"),
        (lambda: PpoConfig(kl_coef=float("nan")), "ppo.kl_coef: nan is negative"),
        (lambda: DataConfig(path="x", seed=-1), "data.seed: -1 is negative"),
        (lambda: ScheduleConfig(steps=9, kind="constant", final=0.1), "schedule.final: constant does not decay"),
    ],
)
def test_numbers_that_mean_nothing(make: Callable[[], object], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{problem}"):
        make()
