"""What tests of the user's files share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, an empty one, as a relative path: it can be used whoever may read those above it."""
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return Path()


@pytest.fixture
def refused():
    """Return a context in which a path can't be read, whoever runs the tests."""

    @contextmanager
    def refuse(path: Path) -> Iterator[None]:
        user, mode = os.geteuid(), path.stat().st_mode
        path.chmod(0)
        if user == 0:
            os.seteuid(65534)  # modes don't count for an administrator
        try:
            yield
        finally:
            os.seteuid(user)
            path.chmod(mode)

    return refuse
