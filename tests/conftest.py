"""Fixtures that every test may use."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import deltaic
import numpy as np
import pytest
import tiny

if TYPE_CHECKING:
    from deltaic import Model


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


@pytest.fixture(scope="session")
def device(ops: ModuleType) -> str:
    """The name under which `deltaic.load` knows the op set."""
    return ops.__name__.rpartition(".")[2]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete random checkpoint (tiny.py). Do not change it: copy it."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_folder`, with experts."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny_moe"), moe=True)


@pytest.fixture(scope="session", params=["dense", "moe"])
def tiny_mtp_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_folder` and `tiny_moe_folder`, with an MTP layer, which predicts nothing."""
    moe = request.param == "moe"
    return tiny.add_mtp(tiny.write_checkpoint(tmp_path_factory.mktemp("tiny_mtp"), moe=moe))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path, device: str) -> Model:
    """The tiny checkpoint in float32, on every op set."""
    return deltaic.load(tiny_folder, device=device, dtype="f32")
