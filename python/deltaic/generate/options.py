"""What may be asked of a generation? Its options, checked, and where their defaults come from: the checkpoint, else the
family's recommendations."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..arguments import integer, number
from ..errors import ArgumentError, ConfigError
from ..fileio import read_json_object
from .stop import check_stop

if TYPE_CHECKING:
    from ..model.config import TextConfig

MAX_NEW_TOKENS = 32768  # the output length that the model cards recommend
MAX_LOGPROBS = 100


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `Model.generate`, `chat` and `stream`. Left out or None: the checkpoint's
    generation_config.json, else the family's recommended sampling (`recommended_sampling`).

    max_new_tokens      at least 1; default 32768 or what the context leaves
    temperature         0 = greedy (the most probable token, the lowest id on ties)
    top_k               keep the k most probable tokens; 0 = off
    top_p               keep the smallest set of tokens whose probabilities reach top_p; 1 = off
    min_p               drop tokens less probable than min_p times the most probable one; 0 = off
    presence_penalty    taken from the logit of every token that was generated before
    frequency_penalty   taken from the logit once per earlier occurrence
    repetition_penalty  divides positive and multiplies negative logits of tokens in prompt or output; 1 = off
    seed                same seed, prompt, settings, thread count and build: same tokens
    stop                string(s) that end the answer (they do not end thinking); the text before the match is returned
    logprobs            number of most probable tokens to report with each generated one; 0 = the chosen one only
    speculate           "auto", "mtp", "lookup" or "off", see `deltaic.load`; the tokens are the same with each
    """

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    speculate: str | None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the defaults sample from the model's own distribution. Raises ArgumentError on a value out
    of its range (the ranges are those of `__post_init__`). Penalties apply first, then temperature, top_k, top_p,
    min_p."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: float | int) -> None:
            object.__setattr__(self, name, value)

        put("temperature", number("temperature", self.temperature, 0.0, 100.0))
        put("top_k", integer("top_k", self.top_k, 0, 2**31 - 1))
        put("top_p", number("top_p", self.top_p, 0.0, 1.0, above_low=True))
        put("min_p", number("min_p", self.min_p, 0.0, 1.0))
        put("presence_penalty", number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        put("repetition_penalty", number("repetition_penalty", self.repetition_penalty, 0.01, 100.0))
        if self.seed is not None:
            put("seed", integer("seed", self.seed, 0, 2**64 - 1))
        # logits divided by less would leave float32's range, and the choice is the most probable token anyway
        if self.temperature < 1e-5:
            put("temperature", 0.0)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens used before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_NAMES = tuple(f.name for f in fields(SamplingParams))


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ArgumentError for an option that is unknown or wrong whatever the model: said before one is loaded, or a
    long prompt is prepared."""
    check_option_names(options)
    check_stop(options.get("stop"))
    check_logprobs(options.get("logprobs"))
    resolve_sampling(options, {}, {})
    if options.get("max_new_tokens") is not None:
        integer("max_new_tokens", options["max_new_tokens"], 1, 2**31 - 1)


def check_option_names(options: Mapping[str, Any]) -> None:
    """Raises ArgumentError for a keyword that is no generation option, with the nearest one that is."""
    known = list(GenerationOptions.__annotations__)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known options: {', '.join(known)}"
            raise ArgumentError(f"{name}: not a generation option; {hint}")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Sampling fields, `max_new_tokens` and `do_sample` of the checkpoint's generation_config.json; {} where there is
    none. Raises ConfigError naming file, key and value when the file cannot be read or holds an impossible value."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    raw = read_json_object(path)
    wanted = {name: raw[name] for name in (*_NAMES, "max_new_tokens") if name != "seed" and raw.get(name) is not None}
    try:
        SamplingParams(**{name: value for name, value in wanted.items() if name != "max_new_tokens"})
        if "max_new_tokens" in wanted:
            integer("max_new_tokens", wanted["max_new_tokens"], 1, 2**31 - 1)
    except ArgumentError as error:
        raise ConfigError(f"{path}: {error}; correct or remove the key") from None
    do_sample = raw.get("do_sample")
    if not isinstance(do_sample, (bool, type(None))):
        raise ConfigError(f"{path}: do_sample: expected true or false, found {do_sample!r}")
    if do_sample is not None:
        wanted["do_sample"] = do_sample
    return wanted


def is_small(config: TextConfig) -> bool:
    """True for sizes whose cards give the advice of 0.8B and 2B: the text layers hold fewer than two billion parameters
    by the estimate below."""
    if config.is_moe:
        ffn = 3 * (config.num_experts * config.moe_intermediate_size + config.shared_expert_intermediate_size)
    else:
        ffn = 3 * config.intermediate_size
    # per layer: FFN plus about four square projections of the mixer
    per_layer = config.hidden_size * ffn + 4 * config.hidden_size**2
    return config.num_hidden_layers * per_layer < 2_000_000_000


def recommended_sampling(*, small: bool, thinking: bool, image: bool) -> dict[str, Any]:
    """The model cards' recommended sampling, by model size, thinking and whether the prompt holds pictures."""
    if thinking:
        if small and image:
            return {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "presence_penalty": 0.0}
        return {"temperature": 1.0, "top_p": 0.95, "top_k": 20, "presence_penalty": 1.5}
    if small and not image:
        return {"temperature": 1.0, "top_p": 1.0, "top_k": 20, "presence_penalty": 2.0}
    return {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5}


def resolve_sampling(
    options: Mapping[str, Any], generation_config: Mapping[str, Any], recommended: Mapping[str, Any]
) -> SamplingParams:
    """Each field from the call, else from the checkpoint, else from the family's recommendation.

    `do_sample: false` in the checkpoint is temperature 0. Greedy decoding takes penalties from the call or the
    checkpoint only: the recommended ones belong to sampling, and greedy should mean the model's most probable token.
    """
    given = {name: options[name] for name in _NAMES if options.get(name) is not None}
    checkpoint = {name: value for name, value in generation_config.items() if name in _NAMES}
    if generation_config.get("do_sample") is False:
        checkpoint["temperature"] = 0.0
    chosen = {**recommended, **checkpoint, **given}
    params = SamplingParams(**chosen)
    if params.greedy:
        chosen = {n: v for n, v in chosen.items() if n not in _PENALTIES or n in given or n in checkpoint}
        params = SamplingParams(**chosen)
    return params


def check_logprobs(logprobs: Any) -> int | None:
    """The `logprobs` argument: None (off) or the number of alternatives per token, 0 to MAX_LOGPROBS."""
    return None if logprobs is None else integer("logprobs", logprobs, 0, MAX_LOGPROBS)
