"""Where tests find real files."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real meshes and clouds; none of them may be published with this package."""
    folder = os.environ.get("SINKFORMER_TEST_DATA")
    if not folder:
        pytest.skip("SINKFORMER_TEST_DATA is unset: no real data")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Problems of a test are so small that a second thread costs more than it brings."""
    torch.set_num_threads(1)
