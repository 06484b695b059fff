"""How do messages become the text that the model was trained on? The checkpoint's own Jinja chat template, rendered in
a sandbox.

Messages are OpenAI / Hugging Face style dicts. `clean_messages` checks them and separates pictures from text: a
template only ever sees plain strings, lists and dicts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, ConfigError, PromptError
from ..fileio import read_json_object, read_text

if TYPE_CHECKING:
    import jinja2

BARE_IMAGE = None  # stands, in the list of pictures, for an image part without data

_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "enable_thinking"}
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A checkpoint's chat template(s), by name; "default" is the usual one. Without any, `render` raises
    PromptError."""

    def __init__(
        self, sources: str | Mapping[str, str], *, variables: Mapping[str, str] | None = None, origin: str = "template"
    ) -> None:
        """sources: Jinja text, or texts by name. variables: what templates may also use (eos_token, ...). origin: file,
        for messages.

        Raises ConfigError if a text is not a valid template."""
        self.sources: dict[str, str] = {"default": sources} if isinstance(sources, str) else dict(sources)
        self.origin = origin
        self._variables = dict(variables or {})
        self._compiled: dict[str, jinja2.Template] = {}
        if self.sources:
            import jinja2

            from .sandbox import TemplateSandbox

            sandbox = TemplateSandbox()
            for name, source in self.sources.items():
                try:
                    self._compiled[name] = sandbox.load_text(source)
                except jinja2.TemplateSyntaxError as error:
                    raise ConfigError(
                        f"{origin}: chat template {name!r}, line {error.lineno}: {error.message}"
                    ) from error
                except (
                    RecursionError,
                    MemoryError,
                    ValueError,
                    SyntaxError,
                ) as error:  # nested too deeply for the compiler
                    raise ConfigError(f"{origin}: chat template {name!r} does not compile ({error})") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate:
        """The first of `chat_template.jinja`, `chat_template.json`, and `chat_template` in `tokenizer_config.json`.

        A folder without any (a base model) gives a ChatTemplate that cannot render. Raises ConfigError for malformed
        files."""
        folder = Path(folder)
        settings: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").is_file():
            settings = read_json_object(folder / "tokenizer_config.json")
        variables = {}
        for key in _TOKENS:
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                variables[key] = token
        if (path := folder / "chat_template.jinja").is_file():
            return cls(read_text(path), variables=variables, origin=str(path))
        if (path := folder / "chat_template.json").is_file():
            return cls(_named(read_json_object(path).get("chat_template"), path), variables=variables, origin=str(path))
        path = folder / "tokenizer_config.json"
        if settings.get("chat_template") is not None:
            return cls(_named(settings["chat_template"], path), variables=variables, origin=str(path))
        return cls({}, variables=variables, origin=str(folder))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        merge_system: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of `messages`, each picture as one placeholder.

        thinking: None leaves the choice to the template. tools: JSON schemas of functions. merge_system: gather
        system messages that come later into the first one, because the family's templates refuse them. variables:
        more for the template (add_vision_id, ...). Raises PromptError with the template's own message, ArgumentError
        for bad arguments."""
        return self.render_clean(
            clean_messages(messages, merge_system=merge_system)[0],
            thinking=thinking,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    def render_clean(
        self,
        messages: list[dict[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """As `render`, for messages that `clean_messages` returned."""
        if thinking is not None and not isinstance(thinking, bool):
            raise ArgumentError(f"thinking: expected True, False or None (the template's default), found {thinking!r}")
        if clash := _RESERVED & set(variables or {}):
            raise ArgumentError(
                f"variables: {', '.join(sorted(clash))}: set by deltaic; use the arguments thinking, tools and so on"
            )
        values = {**self._variables, **(variables or {})}
        values.update(
            messages=messages,
            tools=_clean_tools(tools),
            documents=None,
            add_generation_prompt=bool(add_generation_prompt),
        )
        if thinking is not None:
            values["enable_thinking"] = thinking
        return self._run(self._choose(tools), values)

    def _choose(self, tools: Any) -> jinja2.Template:
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        if name not in self._compiled:
            found = ", ".join(sorted(self._compiled)) or "none"
            raise PromptError(
                f"{self.origin}: expected a chat template named 'default' (chat_template.jinja, chat_template.json or "
                f"tokenizer_config.json), found {found}; give plain text to generate() instead, or add a template"
            )
        return self._compiled[name]

    def _run(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        import jinja2

        from .sandbox import render

        try:
            return render(template, values)
        except jinja2.TemplateError as error:
            raise PromptError(f"chat template: {error.message or error}") from error
        except Exception as error:  # a template may fail in any way at unexpected messages
            raise PromptError(
                f"chat template: cannot render these messages ({type(error).__name__}: {error})"
            ) from error

    @staticmethod
    def starts_in_thinking(rendered: str) -> bool:
        """Whether the answer to the prompt `rendered` begins inside the reasoning: the prompt ends with an open
        `<think>`."""
        return rendered.rstrip().endswith("<think>")


def clean_messages(messages: Any, *, merge_system: bool = True) -> tuple[list[dict[str, Any]], list[Any]]:
    """Checked plain copies of `messages`, and their pictures in order of appearance (BARE_IMAGE for an image part
    without data).

    Tool-call arguments given as JSON text (OpenAI's form) become mappings, which templates expect. Raises
    PromptError."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError(
            f"messages: expected a list of dicts with 'role' and 'content', found {type(messages).__name__}"
        )
    if not messages:
        raise PromptError("messages: expected at least one message, found an empty list")
    images: list[Any] = []
    cleaned = [_clean_message(message, f"messages[{i}]", images) for i, message in enumerate(messages)]
    return (_merge_system(cleaned) if merge_system else cleaned), images


def _clean_message(message: Any, where: str, images: list[Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where}: expected a dict with 'role' and 'content', found {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str):
        raise PromptError(f"{where}.role: expected 'system', 'user', 'assistant' or 'tool', found {role!r}")
    cleaned = dict(message)
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        if role == "system" and any(isinstance(part, Mapping) and part.get("type") != "text" for part in content):
            raise PromptError(f"{where}: expected only text in a system message; put pictures into a user message")
        cleaned["content"] = [_clean_part(part, f"{where}.content[{i}]", images) for i, part in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise PromptError(f"{where}.content: expected a str, a list of parts or None, found {type(content).__name__}")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, (list, tuple)):
            raise PromptError(f"{where}.tool_calls: expected a list, found {type(calls).__name__}")
        cleaned["tool_calls"] = [_clean_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return cleaned


def _clean_part(part: Any, where: str, images: list[Any]) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where}: expected a dict like {{'type': 'text', 'text': ...}}, found {type(part).__name__}")
    kind = part.get("type")
    if kind is None:
        kind = next((key for key in ("image", "image_url", "video", "text") if key in part), None)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{where}.text: expected a str, found {type(part.get('text')).__name__}")
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        images.append(_image_of(part, where))
        return {"type": "image", "image": ""}
    if kind in ("video", "video_url"):
        raise PromptError(f"{where}: videos are not supported; give single pictures ('type': 'image') instead")
    raise PromptError(f"{where}.type: expected 'text', 'image' or 'image_url', found {kind!r}")


def _image_of(part: Mapping[str, Any], where: str) -> Any:
    found = [key for key in _IMAGE_KEYS if part.get(key) is not None]
    if not found:
        return BARE_IMAGE
    if len(found) > 1:
        raise PromptError(f"{where}: expected one of {', '.join(_IMAGE_KEYS)}, found {', '.join(found)}")
    value = part[found[0]]
    if isinstance(value, Mapping):
        value = value.get("url")
        if not isinstance(value, str):
            raise PromptError(f"{where}.{found[0]}.url: expected a str, found {type(value).__name__}")
    if found[0] == "base64":
        if not isinstance(value, str):
            raise PromptError(f"{where}.base64: expected a str, found {type(value).__name__}")
        value = "data:;base64," + value
    return value


def _clean_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise PromptError(f"{where}: expected a dict with 'function', found {type(call).__name__}")
    cleaned = dict(call)
    if "function" in call:
        cleaned["function"] = _clean_function(call["function"], f"{where}.function")
        return cleaned
    return _clean_function(cleaned, where)


def _clean_function(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f"{where}: expected a dict with 'name' and 'arguments', found {function!r:.80}")
    cleaned = dict(function)
    if "arguments" in function:
        arguments = function["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                raise PromptError(
                    f"{where}.arguments: expected JSON, found text that does not parse ({error})"
                ) from error
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping):
            raise PromptError(
                f"{where}.arguments: expected a mapping or JSON text of one, found {type(arguments).__name__}"
            )
        cleaned["arguments"] = dict(arguments)
    return cleaned


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = [message for message in messages if message["role"] == "system"]
    if not system or (len(system) == 1 and messages[0] is system[0]):
        return messages
    texts = (_text(message.get("content")).strip() for message in system)
    merged = {**system[0], "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in messages if message["role"] != "system")]


def _text(content: Any) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _clean_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise PromptError(f"tools: expected a list of function schemas (dicts), found {type(tools).__name__}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise PromptError(
                f"tools[{i}]: expected a dict with the function's JSON schema, found {type(tool).__name__}"
            )
    return [dict(tool) for tool in tools]


def _named(value: Any, path: Path) -> str | dict[str, str]:
    """A template's text, or texts by name, from its JSON form."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    if isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in value
    ):
        return {item["name"]: item["template"] for item in value}
    raise ConfigError(
        f"{path}: chat_template: expected text or a list of {{'name', 'template'}}, found {type(value).__name__}"
    )
