"""Where is the model? Turns what the user wrote (a folder, or a Hugging Face hub id) into a local folder, downloading
what is missing. Everything that can go wrong on the way is said in one sentence with what to do about it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import ArgumentError, CheckpointError

# What a checkpoint needs and nothing else: no pickles, no other frameworks' weights, no pictures of the model card.
ALLOW_PATTERNS = ("*.json", "*.jinja", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer*")
IGNORE_PATTERNS = ("*/*",)  # the patterns above also match inside sub-folders (original/, onnx/, ...)

_HUB_ID = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


def find_model(model: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of `model`: itself if it is a folder, else the downloaded snapshot of the hub id (owner/name).

    `revision` (branch, tag or commit) and `token` are for the hub only. Progress bars are huggingface_hub's own.
    Raises ArgumentError if `model` is neither a folder nor a well-formed hub id, CheckpointError if the download fails.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise ArgumentError(f"model is a {type(model).__name__}; expected a folder or a Hugging Face hub id")
    name = os.fspath(model)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ArgumentError(f"model is {name!r}; expected a folder or a Hugging Face hub id like Qwen/Qwen3.5-0.8B")
    expanded = os.path.expanduser(name)
    if os.path.isdir(expanded):
        return Path(expanded)
    if os.path.lexists(expanded):
        raise CheckpointError(
            f"{name} is a file; expected the folder that holds config.json and model.safetensors "
            f"(single-file formats such as GGUF are not supported yet)"
        )
    parts = name.split("/")
    if not isinstance(model, str) or _looks_like_path(name, parts):
        raise CheckpointError(f"{name} does not exist; expected a folder with config.json and model.safetensors")
    if len(parts) != 2 or not all(_HUB_ID.fullmatch(part) for part in parts) or "--" in name or ".." in name:
        raise ArgumentError(
            f"model is {name!r}: there is no such folder, and it is not a hub id either; expected owner/name of "
            f"letters, digits, '-', '_' and '.', like Qwen/Qwen3.5-0.8B"
        )
    return _download(name, revision, token)


def _looks_like_path(name: str, parts: list[str]) -> bool:
    return os.path.isabs(name) or name.startswith((".", "~")) or "\\" in name or len(parts) > 2 or parts[-1] == ""


def _download(name: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=list(ALLOW_PATTERNS),
            ignore_patterns=list(IGNORE_PATTERNS),
        )
    except HFValidationError as error:
        raise ArgumentError(f"model is {name!r}, which the hub does not take as an id: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its conditions on the model's page on the hub, then log in (`hf auth login`) or "
            f"pass a token"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a model on the hub; check the spelling, and log in "
            f"(`hf auth login`) or pass a token if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} exists on the hub, but has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}{at} is not in the local cache, and the hub cannot be reached; check the connection (and that "
            f"HF_HUB_OFFLINE is not set), or give a folder"
        ) from error
    # The HTTP library below huggingface_hub has changed between versions; its errors are OSErrors in the one
    # (requests) and plain Exceptions in the other (httpx). Whatever it is, the user must learn what failed.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name}{at} could not be downloaded: {reason}") from error
    return Path(folder)
