"""Fixtures that every test may use."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tiny

import deltaic

if TYPE_CHECKING:
    from deltaic import Model


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts the same in every test."""
    return np.random.default_rng(20260101)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete random checkpoint (tiny.py). Do not change it: copy it."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", params=["reference", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Every op set that runs here."""
    if request.param == "cpu":
        try:
            importlib.import_module("deltaic.ops.cpu")
        except ImportError as error:
            pytest.skip(f"the compiled extension is not built: {error}")
    return request.param


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path, device: str) -> Model:
    """The tiny checkpoint in float32, on every op set."""
    return deltaic.load(tiny_folder, device=device, dtype="f32")
