"""Libraries of the extras: `from tests.optional import h5py` skips the file of tests where h5py isn't installed."""

from types import ModuleType

import pytest


def __getattr__(name: str) -> ModuleType:
    """Import a library, or skip."""
    return pytest.importorskip(name, reason=f"{name} isn't installed: pip install -e '.[test]'")
