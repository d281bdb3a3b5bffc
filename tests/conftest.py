"""Where tests find real files."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real meshes and clouds; none of them may be published with this package."""
    folder = os.environ.get("SINKFORMER_TEST_DATA")
    if not folder:
        pytest.skip("SINKFORMER_TEST_DATA is unset: no real data")
    return Path(folder)
