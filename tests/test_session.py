"""Conversations as objects: they remember, go back, branch, and go on in another process."""

from __future__ import annotations

import json
import os
import shutil

import deltaic
import pytest
from deltaic import ArgumentError, DeltaicError, PromptError, Session, State, StateError, cli
from deltaic.model.state_file import save_state
from tiny import picture

OPTIONS = {"max_new_tokens": 5, "temperature": 0.0, "thinking": False}
SYSTEM = [{"role": "system", "content": "You are a cat."}]


def roles(session):
    return [message["role"] for message in session.messages]


@pytest.fixture
def model(tiny_folder, device):
    return deltaic.load(tiny_folder, device=device, dtype="f32", cache_bytes=64 << 20)


@pytest.fixture
def uncached(tiny_folder, device):
    return deltaic.load(tiny_folder, device=device, dtype="f32", cache_bytes=0)


def test_a_session_says_what_the_model_says(model, uncached):
    session = model.session(SYSTEM, **OPTIONS)
    messages = list(SYSTEM)
    for text in ("who are you?", "where do you sit?", "why?"):
        messages.append({"role": "user", "content": text})
        expected = uncached.chat(messages, **OPTIONS)
        result = session.say(text)
        assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
        messages.append({"role": "assistant", "content": result.text})
        assert session.messages == messages
    assert result.cached_tokens > result.prompt_tokens / 2


def test_a_session_remembers_without_a_cache(uncached):
    session = uncached.session(SYSTEM, **OPTIONS)
    first = session.say("one")
    header = len(uncached.tokenizer.encode("<|im_start|>assistant\n<think>\n\n</think>\n\n"))
    second = session.say("two")
    assert second.cached_tokens == first.prompt_tokens - header
    assert len(uncached.cache) == 0
    assert uncached.chat("one", max_new_tokens=1).cached_tokens == 0


def test_options_of_a_turn_come_first(model):
    session = model.session(**OPTIONS)
    assert session.say("one", max_new_tokens=1).completion_tokens == 1
    assert session.say("two").completion_tokens <= 5
    assert session.say("three", thinking=True).reasoning is not None
    assert "reasoning_content" in session.messages[-1] or session.messages[-1]["content"] == ""


def test_streaming_and_closing_early(model):
    session = model.session(**OPTIONS)
    stream = session.stream("one")
    first = next(stream)
    assert session.messages == []
    stream.close()
    assert roles(session) == ["user", "assistant"]
    assert session.messages[1]["content"] == stream.result.text
    assert first.token_id is not None
    unread = session.stream("two")
    unread.close()
    assert roles(session) == ["user", "assistant"]
    session.stream("dropped")
    left = session.stream("left")
    next(left)
    assert session.say("two").text == session.messages[-1]["content"]
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["one", "left", "two"]
    assert left.result.finish_reason == "cancelled"


def test_after_an_error_it_stands_where_it_stood(model, monkeypatch):
    session = model.session(**OPTIONS)
    session.say("one")
    before = list(session.messages)
    for wrong in ("", "  ", None, 3, "a <|image_pad|> of nothing", "long " * 3000):
        with pytest.raises(PromptError):
            session.say(wrong)
    with pytest.raises(ArgumentError):
        session.say("two", temperature=-1)
    with pytest.raises(DeltaicError):
        session.say("two", images=["/no/such.png"])

    def failing(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model._runner.text, "run_layers", failing)
        with pytest.raises(MemoryError):
            session.say("two")
    assert session.messages == before
    session.say("two")
    assert len(session.messages) == 4


@pytest.mark.parametrize("wrong", [3, "hi", {"role": "user"}, [3]])
def test_messages_to_begin_with_are_checked(model, wrong):
    with pytest.raises(PromptError):
        model.session(wrong)


def test_settings_are_checked(model):
    with pytest.raises(ArgumentError, match="heat"):
        model.session(heat=1)


def test_undo_and_fork(model, uncached):
    session = model.session(SYSTEM, **OPTIONS)
    session.say("one")
    session.say("two")
    fork = session.fork()
    fork.say("three")
    session.undo()
    assert roles(session) == ["system", "user", "assistant"]
    assert len(fork.messages) == 7
    again = session.say("another two")
    assert again.cached_tokens > 0
    expected = uncached.chat(session.messages[:-1], **OPTIONS)
    assert again.token_ids == expected.token_ids
    session.undo(2)
    assert session.messages == SYSTEM
    for turns in (1, 0, -1, "1"):
        with pytest.raises(ArgumentError, match="turns"):
            session.undo(turns)


def test_pictures_stay_as_they_were_shown(model, uncached, tmp_path):
    path = tmp_path / "picture.png"
    picture(1).save(path)
    session = model.session(**OPTIONS)
    session.say("what?", images=path)
    expected = uncached.chat([*session.messages, {"role": "user", "content": "and?"}], **OPTIONS)
    picture(2).save(path)
    assert session.say("and?").token_ids == expected.token_ids
    path.unlink()
    assert session.say("and now?").cached_tokens > 0


@pytest.mark.parametrize("images", [0, 1])
def test_a_saved_session_goes_on_in_another_process(model, tiny_folder, device, tmp_path, images):
    session = model.session(SYSTEM, stop=["zzz"], **OPTIONS)
    session.say("one", images=[picture(i) for i in range(images)])
    session.say("two")
    session.save(tmp_path / "session")
    other = deltaic.load(tiny_folder, device=device, dtype="f32", cache_bytes=0)
    loaded = other.load_session(tmp_path / "session")
    assert roles(loaded) == roles(session)
    assert loaded.settings == session.settings
    expected, result = session.say("three"), loaded.say("three")
    assert result.token_ids == expected.token_ids
    assert result.cached_tokens == expected.cached_tokens > result.prompt_tokens / 2
    assert [m["content"] for m in loaded.messages if m["role"] == "assistant"] == [
        m["content"] for m in session.messages if m["role"] == "assistant"
    ]
    assert State.load(tmp_path / "session").length == result.cached_tokens  # the file is a state file as well


def test_an_empty_session_is_saved_too(model, tmp_path):
    model.session().save(tmp_path / "session")
    assert model.load_session(tmp_path / "session").messages == []


def test_files_that_are_no_sessions(model, tiny_moe_folder, device, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(StateError, match="cannot be read"):
        model.load_session(path)
    model.new_state().save(path)
    with pytest.raises(StateError, match="without a conversation"):
        model.load_session(path)
    unknown_picture = [{"role": "user", "content": [{"type": "image", "image": 0}]}]
    for facts in (
        "x", "[]", "{}", '{"messages": 3, "settings": {}}', '{"messages": [], "settings": 3}',
        json.dumps({"messages": unknown_picture, "settings": {}}),
    ):  # fmt: skip
        save_state(model.new_state(), path, metadata={"session": facts})
        with pytest.raises(DeltaicError):
            model.load_session(path)
    session = model.session(**OPTIONS)
    session.say("one")
    session.save(path)
    with pytest.raises(StateError, match="another model"):
        deltaic.load(tiny_moe_folder, device=device, dtype="f32").load_session(path)
    with pytest.raises(ArgumentError, match="plain values"):
        model.session([{"role": "user", "content": "a", "extra": object()}]).save(path)
    assert len(Session.load(model, path).messages) == 2


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def chat(capsys, monkeypatch, tiny_folder, tmp_path):
    def chat(*lines, arguments=(), folder=tiny_folder):
        (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
        flags = ["--device", "reference", "--dtype", "f32", "--max-new-tokens", "4", "--temperature", "0"]
        with open(tmp_path / "lines.txt") as file, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", file)
            code = cli.main(["chat", str(folder), *flags, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return chat


def test_chat_continues_a_session(chat, tmp_path):
    path = tmp_path / "talk"
    arguments = ["--session", str(path), "--cache-bytes", "0"]
    code, out, _ = chat("one", "two", arguments=arguments)
    assert code == 0
    whole = chat("one", "two", "three", arguments=["--cache-bytes", "0"])[1]
    code, more, err = chat("three", arguments=arguments)
    assert code == 0
    assert out + more == whole
    assert "2 turns" in err
    assert "from the cache" in err
    assert chat("/undo", "/undo", "/undo", "/undo", arguments=arguments)[2].count("taken back") == 3
    assert "0 turns" in chat("/exit", arguments=arguments)[2]


def test_chat_refuses_a_file_that_is_no_session(chat, tmp_path, tiny_folder):
    path = tmp_path / "talk"
    path.write_text("my notes")
    code, _, err = chat("one", arguments=["--session", str(path)])
    assert code == 2
    assert err.startswith("deltaic: ")
    assert path.read_text() == "my notes"
    code, _, err = chat("one", arguments=["--session", str(tmp_path / "none" / "talk")])
    assert code == 2
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    good = str(tmp_path / "good")
    chat("one", arguments=["--session", good])
    size = os.path.getsize(good)
    code, _, err = chat("one", arguments=["--session", good], folder=folder)
    assert code == 2
    assert "another model" in err
    assert os.path.getsize(good) == size


def test_context_and_cache_flags(chat):
    code, _, err = chat("one", arguments=["--context", "4"])
    assert code == 0
    assert "room for 4" in err
    assert chat("one", arguments=["--context", "0"])[0] == 2
    assert chat("one", arguments=["--cache-bytes", "-5"])[0] == 2
    assert chat("one", arguments=["--cache-bytes", "2G", "--context", "2000"])[0] == 0
