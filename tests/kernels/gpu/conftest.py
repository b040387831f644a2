"""`--shard=I/N` runs every N-th test from the I-th on: `kernels/gpu.py` has N processes share this folder."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run tests I, I + N, I + 2 N, ...")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard: str | None = config.getoption("--shard", None)
    if shard is not None:
        first, count = map(int, shard.split("/"))
        items[:] = items[first::count]
