"""Fixtures of the chat tests: a small byte-level tokenizer, and transformers' processor over the shared data files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from chat_helpers import make_reference_image_processor, small_backend
from deltaic.chat.template import ChatTemplate
from deltaic.chat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    return Tokenizer(small_backend())


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of shared test data (`../shared/data` beside the repository, or DELTAIC_TEST_DATA)."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("DELTAIC_TEST_DATA", default))
    if not (folder / "qwen_tokenizer.json").is_file():
        pytest.skip(f"no test data in {folder}; set DELTAIC_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def family_source(data: Path) -> str:
    return (data / "qwen3_5_4b_chat_template.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def family_template(family_source: str) -> ChatTemplate:
    return ChatTemplate(family_source)


@pytest.fixture(scope="session")
def family_tokenizer(data: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Tokenizer(Backend.from_file(str(data / "qwen_tokenizer.json")))


@pytest.fixture(scope="session")
def reference_image_processor() -> Any:
    return make_reference_image_processor()


@pytest.fixture(scope="session")
def reference_processor(data: Path, family_source: str, reference_image_processor: Any) -> Any:
    """transformers' whole Qwen3-VL processor (the one of Qwen3.5), without its video part, which needs torchvision."""
    from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor

    class Processor(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(data / "qwen_tokenizer.json"))
    return Processor(
        image_processor=reference_image_processor,
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=family_source,
    )


@pytest.fixture(scope="session")
def reference_model(family_tokenizer: Tokenizer) -> Any:
    """transformers' Qwen3_5Model without weights: only its position rule is used."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5Model

    config = Qwen3_5Config(
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 32},
        vision_config={"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
        image_token_id=family_tokenizer.id_of("<|image_pad|>"),
        video_token_id=family_tokenizer.id_of("<|video_pad|>"),
    )
    with torch.device("meta"):
        return Qwen3_5Model(config)
