"""Every error a user of deltaic can cause. A message names the thing, what was expected and found, and what to do."""

from __future__ import annotations


class DeltaicError(Exception):
    """Base of all errors that deltaic raises on purpose."""


class ConfigError(DeltaicError):
    """A configuration file is missing, malformed, absurd, or asks for something that is not supported."""


class CheckpointError(DeltaicError):
    """A weight file is missing, truncated, malformed, or does not hold the tensors that the configuration asks for."""


class PromptError(DeltaicError):
    """Messages, text, token ids or placeholders of a prompt cannot be used."""


class ContextLengthError(PromptError):
    """A prompt, or a prompt with the tokens asked for, does not fit into the context."""


class ImageError(DeltaicError):
    """A picture cannot be read, decoded or used."""


class ArgumentError(DeltaicError, ValueError):
    """An argument of a public call is out of its range or of the wrong type."""


def unusable_logits(op: str) -> ArgumentError:
    """What is raised where no token can be chosen."""
    return ArgumentError(f"{op}: logits hold NaN or +inf, or nothing but -inf; the model's output cannot be used")


class DeviceError(DeltaicError):
    """A device, instruction set or thread count that was asked for cannot be used on this machine."""


class StateError(DeltaicError):
    """A sequence state does not fit the model, the file or the call that it is used with."""
