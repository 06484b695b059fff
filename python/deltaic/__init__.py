"""Deltaic runs Qwen3.5 models (Gated DeltaNet + gated attention, dense or sparse-MoE, with vision) on one machine,
fast.

    model = deltaic.load("Qwen/Qwen3.5-0.8B")
    print(model.chat("Why is the sky blue?").text)

Importing this package costs little: what a name needs is imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    DeltaicError,
    DeviceError,
    ImageError,
    PromptError,
    StateError,
)

if TYPE_CHECKING:
    from .api import Model
    from .chat.prompt import Prompt
    from .generate.result import GenerationResult, StreamPiece, TokenLogprobs
    from .generate.stream import Stream
    from .loading import load
    from .model.state import State
    from .packing import quantize
    from .session import Session

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DeltaicError",
    "DeviceError",
    "GenerationResult",
    "ImageError",
    "Model",
    "Prompt",
    "PromptError",
    "Session",
    "State",
    "StateError",
    "Stream",
    "StreamPiece",
    "TokenLogprobs",
    "__version__",
    "load",
    "quantize",
]

_LAZY = {
    "GenerationResult": "deltaic.generate.result",
    "Model": "deltaic.api",
    "Prompt": "deltaic.chat.prompt",
    "Session": "deltaic.session",
    "State": "deltaic.model.state",
    "Stream": "deltaic.generate.stream",
    "StreamPiece": "deltaic.generate.result",
    "TokenLogprobs": "deltaic.generate.result",
    "load": "deltaic.loading",
    "quantize": "deltaic.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
