"""What do a checkpoint's files say about talking to it? Tokeniser, chat template and image preprocessing, each read on
first use."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from .image import ImageProcessor
    from .template import ChatTemplate
    from .tokenizer import Tokenizer

    class FromFolder(Protocol):
        @classmethod
        def from_folder(cls, folder: str | Path) -> Any: ...


T = TypeVar("T", bound="FromFolder")


class ChatFiles:
    """The files of one folder; usable from several threads. Every property raises ConfigError for malformed files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._read: dict[type[Any], Any] = {}

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokeniser; without one, prompts can only be token ids."""
        return (self.folder / "tokenizer.json").exists()

    @property
    def has_image_processor(self) -> bool:
        """Whether there is anything about image preprocessing."""
        return any((self.folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokeniser."""
        from .tokenizer import Tokenizer

        return self._once(Tokenizer)

    @property
    def template(self) -> ChatTemplate:
        """The chat template; where the folder has none, one that cannot render."""
        from .template import ChatTemplate

        return self._once(ChatTemplate)

    @property
    def image_processor(self) -> ImageProcessor:
        """The image preprocessing."""
        from .image import ImageProcessor

        return self._once(ImageProcessor)

    def _once(self, kind: type[T]) -> T:
        with self._lock:
            if kind not in self._read:
                self._read[kind] = kind.from_folder(self.folder)
            found: T = self._read[kind]
            return found
