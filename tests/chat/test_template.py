"""The chat template: equal to transformers for the family's file, friendly to messages, safe against hostile
templates."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from deltaic.chat import sandbox
from deltaic.chat.template import BARE_IMAGE, ChatTemplate, clean_messages
from deltaic.errors import ArgumentError, ConfigError, PromptError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter <jetzt> für \"Ort\" & 'Tag' 天",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": {}}},
]
CALL = {
    "type": "function",
    "function": {
        "name": "weather",
        "arguments": {"place": "Köln", "days": 1234567890, "deep": {"b": [1], "a": "<"}, "now": True, "no": None},
    },
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Why is the sky blue?  \n"}],
    "system": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ],
    "turns": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nsum\n</think>\n\n2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "again"},
        {"role": "user", "content": "3+3?"},
    ],
    "calls": [
        {"role": "system", "content": [{"type": "text", "text": "Use "}, {"type": "text", "text": "tools."}]},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [CALL, {"name": "time", "arguments": {}}],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
    ],
    "ends with assistant": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


def reference_render(source: str, messages: Any, **variables: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered = render_jinja_template([messages], chat_template=source, **variables)[0]
    return rendered[0] if isinstance(rendered, list) else rendered


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equals_transformers(
    family_template: ChatTemplate, family_source: str, name: str, tools: Any, thinking: bool | None
) -> None:
    messages = CONVERSATIONS[name]
    for add_generation_prompt in (True, False):
        extra = {} if thinking is None else {"enable_thinking": thinking}
        expected = reference_render(
            family_source, messages, tools=tools, add_generation_prompt=add_generation_prompt, **extra
        )
        found = family_template.render(
            messages, thinking=thinking, tools=tools, add_generation_prompt=add_generation_prompt
        )
        assert found == expected


def test_images_equal_transformers(family_template: ChatTemplate, family_source: str) -> None:
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "and"},
                {"type": "image_url", "image_url": {"url": "b.png"}},
                {"image": "c.png"},
            ],
        },
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [{"type": "text", "text": "last"}, {"type": "image"}]},
    ]
    for variables in ({}, {"add_vision_id": True}):
        expected = reference_render(family_source, messages, add_generation_prompt=True, **variables)
        assert family_template.render(messages, variables=variables) == expected
    assert expected.count("Picture ") == 4


def test_thinking_is_left_to_the_template_and_seen_at_the_end(family_template: ChatTemplate) -> None:
    small_default = ChatTemplate(
        "{% if enable_thinking is defined and enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    )
    messages = [{"role": "user", "content": "<think>"}]
    for template, default in ((family_template, True), (small_default, False)):
        for thinking, expected in ((None, default), (True, True), (False, False)):
            assert template.starts_in_thinking(template.render(messages, thinking=thinking)) is expected
    assert not family_template.starts_in_thinking(family_template.render(messages, add_generation_prompt=False))


def test_later_system_messages_are_merged(family_template: ChatTemplate) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": " second "},
        {"role": "assistant", "content": "Hello"},
        {"role": "system", "content": [{"type": "text", "text": "third"}]},
        {"role": "user", "content": "Go on"},
    ]
    rendered = family_template.render(messages)
    assert rendered.startswith("<|im_start|>system\nsecond\n\nthird<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    assert rendered.count("<|im_start|>system") == 1
    with pytest.raises(PromptError, match="System message must be at the beginning"):
        family_template.render(messages, merge_system=False)
    first = [{"role": "system", "content": "first"}, *messages]
    assert family_template.render(first).startswith("<|im_start|>system\nfirst\n\nsecond\n\nthird<|im_end|>\n")
    assert messages[1] == {"role": "system", "content": " second "}  # the caller's messages are left alone


def test_tool_arguments_as_json_text(family_template: ChatTemplate) -> None:
    def conversation(arguments: Any) -> list[dict[str, Any]]:
        call = {"function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

    for text, value in (('{"a": 1, "b": [true]}', {"a": 1, "b": [True]}), ("", {}), (" ", {}), (None, {})):
        assert family_template.render(conversation(text)) == family_template.render(conversation(value))
    for bad, message in (
        ("{", "does not parse"),
        ("[1]", "found list"),
        ("[" * 100_000, "does not parse"),
        (3, "found int"),
    ):
        with pytest.raises(PromptError, match=rf"messages\[1\]\.tool_calls\[0\].*{message}"):
            family_template.render(conversation(bad))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "list of dicts"),
        ({"role": "user"}, "list of dicts"),
        (None, "list of dicts"),
        ([], "at least one message"),
        (["hello"], r"messages\[0\]: expected a dict"),
        ([{"content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "robot", "content": "x"}], "Unexpected message role|No user query"),
        ([{"role": "system", "content": "x"}], "No user query found"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "found 'audio'"),
        ([{"role": "user", "content": [{}]}], "found None"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "videos are not supported"),
        ([{"role": "user", "content": [{"video": "x"}]}], "videos are not supported"),
        ([{"role": "user", "content": [{"type": "image", "image": "x", "url": "y"}]}], "found image, url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"href": "x"}}]}], "image_url.url"),
        ([{"role": "system", "content": [{"type": "image", "image": "x"}]}], "only text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": "x"}], "tool_calls: expected a list"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {}}]}], "'name'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [3]}], r"tool_calls\[0\]"),
    ],
)  # fmt: skip
def test_bad_messages(family_template: ChatTemplate, messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        family_template.render(messages)


def test_bad_arguments(family_template: ChatTemplate) -> None:
    messages = CONVERSATIONS["one"]
    with pytest.raises(ArgumentError, match="thinking"):
        family_template.render(messages, thinking="yes")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="messages"):
        family_template.render(messages, variables={"messages": []})
    for tools in ("x", {"a": 1}, [3], [{"x": {1, 2}}]):
        with pytest.raises(PromptError, match=r"tools|serializable"):
            family_template.render(messages, tools=tools)  # type: ignore[arg-type]
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(PromptError, match="chat template"):
        family_template.render(messages, tools=[loop])


def test_image_forms() -> None:
    parts = [
        {"type": "image", "image": "a"}, {"type": "image", "url": "b"}, {"type": "image", "path": "c"},
        {"type": "image", "base64": "ZA=="}, {"type": "image_url", "image_url": "e"},
        {"type": "image_url", "image_url": {"url": "f"}},
        {"image": b"g"}, {"image_url": {"url": "h", "detail": "low"}}, {"type": "image"},
    ]  # fmt: skip
    messages, images = clean_messages([{"role": "user", "content": parts}])
    assert images == ["a", "b", "c", "data:;base64,ZA==", "e", "f", b"g", "h", BARE_IMAGE]
    assert messages[0]["content"] == [{"type": "image", "image": ""}] * len(parts)


# where templates come from


def test_folder_order(tmp_path: Path) -> None:
    messages = CONVERSATIONS["one"]
    with pytest.raises(PromptError, match="found none; give plain text"):
        ChatTemplate.from_folder(tmp_path).render(messages)
    settings: dict[str, Any] = {
        "chat_template": "tc {{ eos_token }}",
        "eos_token": {"content": "<e>"},
        "bos_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.from_folder(tmp_path).render(messages) == "tc <e>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json {{ eos_token }}"}))
    assert ChatTemplate.from_folder(tmp_path).render(messages) == "json <e>"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ eos_token }}é", encoding="utf-8")
    assert ChatTemplate.from_folder(tmp_path).render(messages) == "jinja <e>é"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template.render(CONVERSATIONS["one"]) == "plain"
    assert template.render(CONVERSATIONS["one"], tools=TOOLS) == "tools"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[1:]}))
    with pytest.raises(PromptError, match="found tool_use"):
        ChatTemplate.from_folder(tmp_path).render(CONVERSATIONS["one"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{% if %}", r"line 1"),
        ("chat_template.jinja", "a\n{{ x", r"line 2"),
        ("chat_template.jinja", "{{ x|nosuchfilter }}", "nosuchfilter"),
        ("chat_template.jinja", "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "does not compile"),
        ("chat_template.json", "{", "expected JSON"),
        ("chat_template.json", '{"chat_template": 3}', "expected text or a list"),
        ("chat_template.json", "{}", "expected text or a list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "expected text or a list"),
    ],
)
def test_broken_templates(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        ChatTemplate.from_folder(tmp_path)
    assert name in str(caught.value)


# the sandbox


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render([{"role": "user", "content": "hi"}], variables=variables)


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in [3, 1] %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.nextitem }} {% endfor %}",
        "{% for x in range(9) if x % 2 %}{{ x }}{% if x > 4 %}{% break %}{% endif %}{% else %}none{% endfor %}",
        "{% for k, v in {'a': 1}|items %}{{ k ~ v }}{% endfor %}{% for x in nothing %}{% else %}empty{% endfor %}",
        "{% macro m(x) %}[{{ x }}{{ caller() if caller else '' }}]{% endmacro %}{{ m(2) }}{% call m(3) %}in"
        "{% endcall %}",
        "{% for t in [{'c': [{'c': []}]}] recursive %}<{{ loop(t.c) }}>{% endfor %}",
        "  {% set ns = namespace(t='') %}\n  {% for x in 'abc' %}\n{% set ns.t = ns.t + x * 2 %}"
        "{% endfor %}\n{{ ns.t }}\n",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
        "{{ {'b': '<é>', 'a': [1, none]}|tojson }}{{ {'a': 1}|tojson(indent=2) }}{{ '%s-%03d' % ('x', 7) }}"
        "{{ 'a b'.split() }}",
        "{{ 'x'.center(5) ~ ('ab'|indent(2, true)) ~ ('%s'|format(123456789)) ~ '{}'.format(99999999) }}"
        "{{ 2 ** 10 * 3 }}",
        "{% set a = 'x' %}{% filter upper %}{{ a }}b{% endfilter %}{% set b %}block{{ a }}"
        "{% endset %}{{ b }}{{ missing }}",
    ],
)  # fmt: skip
def test_budgets_change_nothing(source: str) -> None:
    assert render(source) == reference_render(source, [{"role": "user", "content": "hi"}])


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% set x = range(99999)|list %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ 'a' * 10000000000 }}", "{{ [1] * 10000000000 }}", "{{ 10 ** 10000000000 }}", "{{ range(10000000) }}",
        "{{ 'a'.center(10000000000) }}", "{{ 'a'|center(10000000000) }}", "{{ 'a'|indent(10000000000, true) }}",
        "{{ '%1000000000d' % 1 }}", "{{ '%1000000000d'|format(1) }}", "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a'.zfill(width) }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'x' %}", "{{ 1 / 0 }}", "{{ nothing.x }}", "{{ raise_exception('the reason') }}",
        "{{ messages[0].content.x.y }}",
        "{{ strftime_now(3) }}", "{{ messages|tojson(indent=[]) }}", "{{ [messages]|map(attribute='x.y')|list }}",
    ],
)  # fmt: skip
def test_hostile_or_failing_templates_end_in_a_prompt_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 50_000)  # a fortieth: the machine may be busy
    monkeypatch.setattr(sandbox, "MAX_TOTAL", 1 << 26)
    start = time.monotonic()
    with pytest.raises(PromptError, match="chat template"):
        render(source, width=10**10)
    assert time.monotonic() - start < 30


def test_the_templates_own_message_is_kept() -> None:
    with pytest.raises(PromptError, match=r"^chat template: the reason$"):
        render("{{ raise_exception('the reason') }}")


def test_total_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_TOTAL", 10_000)
    with pytest.raises(PromptError, match="10000 in all"):
        render("{% for x in range(9999) %}literal text{% endfor %}")
    assert len(render("{% for x in range(100) %}literal text{% endfor %}")) == 1200


def test_a_template_cannot_reset_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 50_000)
    with pytest.raises(PromptError, match="steps"):
        render(
            "{% set _deltaic_budget = none %}{% for a in range(99999) %}{% for b in range(99) %}{% endfor %}"
            "{% endfor %}"
        )
    with pytest.raises(PromptError, match="steps"):
        render("{% for a in range(99999) %}{% for b in range(99) %}{% endfor %}{% endfor %}", _deltaic_budget=None)


def test_long_conversations_render_quickly(family_template: ChatTemplate) -> None:
    messages = [{"role": role, "content": "word " * 50} for _ in range(2000) for role in ("user", "assistant")]
    start = time.monotonic()
    assert len(family_template.render([*messages, {"role": "user", "content": "end"}])) > 500_000
    assert time.monotonic() - start < 30
