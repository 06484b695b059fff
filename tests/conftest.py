"""Fixtures that every test may use."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts the same in every test."""
    return np.random.default_rng(20260101)


@pytest.fixture(scope="session", params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    """Every op set that is part of this build. One that is there but cannot be imported is a failure, not a skip."""
    name = f"deltaic.ops.{request.param}"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not part of this build")
    return importlib.import_module(name)
