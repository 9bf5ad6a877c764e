from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.engine.tiny import make_tiny_checkpoint

# No timing bars: a busy machine is not a fault of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint for one thread: on busy cores, several wait for each other longer than they reckon."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    torch.set_num_threads(before)
