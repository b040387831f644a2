"""Triton's interpreter is chosen for a whole process: its tests are collected only where their folder is named."""

from collections.abc import Iterator

import pytest
import torch

collect_ignore = ["triton"]


@pytest.fixture(autouse=True, scope="package")
def _two_threads() -> Iterator[None]:
    """Whatever the rest of the run has: loops that share their work are what is tested here."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
