import pytest

from rayllm.engine.ray_executor import threads_per_shard

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("cores", "shards", "parameters", "threads"),
    [
        (2, 1, 135 * MILLION, 2),
        (2, 2, 135 * MILLION, 1),  # a second replica, or a second rank
        (2, 3, 135 * MILLION, 1),
        (16, 3, 135 * MILLION, 5),
        (16, 1, 100_000, 1),
        (16, 1, 2 * MILLION, 3),
    ],
)
def test_no_more_threads_than_have_a_core_and_work(cores: int, shards: int, parameters: int, threads: int) -> None:
    assert threads_per_shard(cores, shards=shards, parameters=parameters) == threads
