"""Engine tests compare bit for bit: torch's attention on a CPU rounds as the thread does that takes a row.

Without a GPU the kernels run in Triton's interpreter.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton asks for it where a kernel is defined, so before the first test imports one.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
