"""One small Ray of the tests' own."""

from collections.abc import Iterator

import pytest

from rayllm_cluster.session import Session


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session.start(num_cpus=6) as session:
        yield session
