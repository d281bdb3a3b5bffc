"""One thread for each process, and what tests are skipped without."""

import os

# Before torch is imported, and in every process that a test starts: the threads of several would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# No example has a limit of time: the machine may be busy.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def no_group_of_processes_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaves its process in a group, and take back what Lightning tells the processes of one."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="session")
def documentation_read_once() -> Iterator[None]:
    """Keep what `Docstrings` reads of Python's own files, which takes two seconds each time."""
    from sinkformer_pl.data.texts import docstrings

    read = docstrings._docstrings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "_docstrings", functools.cache(lambda file: list(read(file))))
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real meshes and clouds; none of them may be published with this package."""
    folder = os.environ.get("SINKFORMER_TEST_DATA")
    if not folder:
        pytest.skip("SINKFORMER_TEST_DATA is unset: no real data")
    return Path(folder)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the path of a browser to click in."""
    pytest.importorskip("playwright", reason="playwright isn't installed: pip install -e '.[browser]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine to look at a page with")
    return found


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """Return the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch can use")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def no_cuda() -> None:
    """Skip where there is a GPU: the test is of what is said without one."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
