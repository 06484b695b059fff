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
    if request.param == "cpu" and importlib.util.find_spec("deltaic._core") is None:
        pytest.skip("deltaic._core is not built")
    return importlib.import_module(f"deltaic.ops.{request.param}")
