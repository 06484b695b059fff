"""Finding a model: folders, hub ids, and every way in which a download fails (no network is used)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from deltaic.errors import ArgumentError, CheckpointError
from deltaic.weights.hub import find_model
from huggingface_hub import utils as hub


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    status_code = 404
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert find_model("~/models") == tmp_path / "models"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3.5-0.8B").mkdir(parents=True)
    assert find_model("Qwen/Qwen3.5-0.8B") == Path("Qwen/Qwen3.5-0.8B")  # a folder wins over a hub id


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the download. `raises` is what it raises; `call` is what it was called with."""
    record: dict[str, Any] = {"raises": None, "call": None}

    def snapshot_download(name: str, **arguments: Any) -> str:
        record["call"] = (name, arguments)
        if record["raises"] is not None:
            raise record["raises"]
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return record


def test_hub_id(download: dict[str, Any]) -> None:
    assert find_model("Qwen/Qwen3.5-0.8B", revision="main", token="secret") == Path("/cache/snapshot")
    name, arguments = download["call"]
    assert name == "Qwen/Qwen3.5-0.8B"
    assert arguments["revision"] == "main"
    assert arguments["token"] == "secret"


def test_only_what_is_needed_is_downloaded(download: dict[str, Any]) -> None:
    find_model("Qwen/Qwen3.5-0.8B")
    _, arguments = download["call"]
    files = {
        "config.json": True,
        "generation_config.json": True,
        "model.safetensors": True,
        "model.safetensors.index.json": True,
        "model-00001-of-00002.safetensors": True,
        "tokenizer.json": True,
        "tokenizer_config.json": True,
        "merges.txt": True,
        "preprocessor_config.json": True,
        "chat_template.jinja": True,
        "pytorch_model.bin": False,
        "model.gguf": False,
        "README.md": False,
        "modeling_evil.py": False,
        "original/model.safetensors": False,
        "onnx/config.json": False,
    }
    patterns = {key: arguments[key] for key in ("allow_patterns", "ignore_patterns")}
    chosen = set(hub.filter_repo_objects(files, **patterns))
    assert chosen == {name for name, wanted in files.items() if wanted}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: hub.GatedRepoError("403", response=Response()), "gated.*log in"),
        (lambda: hub.RepositoryNotFoundError("404", response=Response()), "neither a folder here nor a model"),
        (lambda: hub.RevisionNotFoundError("404", response=Response()), "no revision 'v9'"),
        (lambda: hub.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (lambda: hub.HfHubHTTPError("500 Server Error\nmore", response=Response()), "500 Server Error$"),
        (lambda: OSError(28, "No space left on device"), "No space left on device"),
        (lambda: ConnectionError(), "ConnectionError"),
        (lambda: RuntimeError("something else"), "something else"),
    ],
)
def test_failed_download(download: dict[str, Any], error: Any, message: str) -> None:
    download["raises"] = error()
    with pytest.raises(CheckpointError, match=message) as caught:
        find_model("Qwen/Qwen3.5-0.8B", revision="v9")
    assert "Qwen/Qwen3.5-0.8B" in str(caught.value)


def test_interrupting_a_download_is_not_an_error_of_the_model(download: dict[str, Any]) -> None:
    download["raises"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        find_model("Qwen/Qwen3.5-0.8B")


def test_really_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, told not to use the network, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the local cache"):
        find_model("Qwen/Qwen3.5-0.8B")


@pytest.mark.parametrize(
    "name",
    ["", "  ", "qwen", "a b/c", "Qwen/Qwen 3", "Qwen/-x", "Qwen/x--y", "Qwen/x..y", "ü/x", "x" * 200 + "/y", "a\0/b"],
)
def test_malformed_id(download: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match="hub id"):
        find_model(name)
    assert download["call"] is None


@pytest.mark.parametrize("name", [None, 3, b"bytes", ["a"]])
def test_wrong_type(download: dict[str, Any], name: Any) -> None:
    with pytest.raises(ArgumentError):
        find_model(name)
    assert download["call"] is None


def test_missing_paths_are_not_sent_to_the_hub(download: dict[str, Any], tmp_path: Path) -> None:
    for name in (tmp_path / "gone", str(tmp_path / "gone"), "./gone", "../gone", "~/gone/gone", "a/b/c", "gone/"):
        with pytest.raises(CheckpointError, match="does not exist"):
            find_model(name)
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        find_model(tmp_path / "model.gguf")
    assert download["call"] is None
