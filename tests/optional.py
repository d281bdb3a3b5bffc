"""Libraries of the extras: `from tests.optional import h5py` skips the file of tests where h5py isn't installed."""

from types import ModuleType

import pytest


def __getattr__(name: str) -> ModuleType:
    """Import a library, or skip."""
    if name.startswith("__"):
        raise AttributeError(name)
    name = name.replace("geomloss_ot", "geomloss.ot")
    return pytest.importorskip(name, reason=f"{name} isn't installed: pip install -e '.[test]'")
