"""The command line: what it prints where, its exit codes, and one line for every user error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import deltaic
import pytest
import tiny
from deltaic import cli

SOURCE = Path(deltaic.__file__).parents[1]
REFERENCE = ["--device", "reference", "--dtype", "f32"]
REPEATING = ["--frequency-penalty", "-2", "--temperature", "1", "--top-k", "0", "--top-p", "1", "--seed", "10"]
RAMBLING = [*REPEATING, *REFERENCE]  # answers that do not end by themselves


def heed_ctrl_c():
    """A shell's background jobs, and what they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def deltaic_process(*arguments, **kwargs):
    """`python -m deltaic` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "deltaic", *arguments], env=environment, preexec_fn=heed_ctrl_c, **{**pipes, **kwargs}
    )


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line in this process, without piped input: (exit code, stdout, stderr)."""

    def call(*arguments, stdin=None):
        with open(stdin or os.devnull) as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", file)
            code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    tiny.picture().save(path)
    return path


def test_run_prints_the_answer_and_figures_on_stderr(run, tiny_folder, tiny_model, device):
    code, out, err = run("run", tiny_folder, "the cat", "--max-new-tokens", 12, "--device", device, "--dtype", "f32")
    expected = tiny_model.chat("the cat", max_new_tokens=12)
    assert code == 0
    assert out.rstrip("\n") == expected.text.rstrip("\n")
    assert out.endswith("\n")
    assert f"{expected.prompt_tokens} prompt tokens, {expected.completion_tokens} new tokens" in err
    assert "first token after" in err
    assert "tokens/s" in err


def test_json_is_one_object(run, tiny_folder, picture):
    code, out, _ = run(
        "run", tiny_folder, "what?", "--image", picture, "--image", picture, "--json", "--max-new-tokens", 5,
        "--seed", 3, "--temperature", 1, "--thinking", *REFERENCE,
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["completion_tokens"] == len(found["token_ids"]) <= 5
    assert found["reasoning"] is not None
    assert found["prompt_tokens"] > 20
    assert found["finish_reason"] in ("stop", "length")


def test_sampling_flags_reach_the_model(run, tiny_folder):
    def answer(*flags):
        return run("run", tiny_folder, "hi", "--max-new-tokens", 15, "--temperature", 2, *flags, *REFERENCE)[1]

    assert answer("--seed", 1) == answer("--seed", 1) != answer("--seed", 2)
    assert answer("--seed", 1, "--top-k", 1) == answer("--seed", 2, "--top-k", 1)


def test_load_flags_reach_the_model(run, tiny_folder, monkeypatch):
    found = {}

    def load(path, **options):
        found.update(options)
        raise deltaic.ArgumentError("seen")

    monkeypatch.setattr("deltaic.loading.load", load)
    formats = ("--kv-dtype", "int8", "--dtype", "int4")
    flags = (*formats, "--context", 64, "--threads", 2, "--speculate", "off", "--no-screen")
    assert run("run", tiny_folder, "hi", *flags)[0] == 2
    expected = {"kv_dtype": "int8", "context": 64, "threads": 2, "dtype": "int4", "speculate": "off", "screen": False}
    assert {name: found[name] for name in expected} == expected


def test_piped_text_is_read(tiny_folder, tmp_path, run):
    text = tmp_path / "text.txt"
    text.write_text("the cat")
    arguments = ["--max-new-tokens", 5, "--json", *REFERENCE]

    def count(*words, stdin=None):
        return json.loads(run("run", tiny_folder, *words, *arguments, stdin=stdin)[1])["prompt_tokens"]

    assert count(stdin=text) == count("the cat")
    assert count("sat", stdin=text) == count("sat\n\nthe cat")


def test_a_pipe_is_read_and_a_broken_one_is_quiet(tiny_folder):
    process = deltaic_process("run", str(tiny_folder), "--max-new-tokens", "500", *RAMBLING, stdin=subprocess.PIPE)
    process.stdin.write(b"the cat")
    process.stdin.close()
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_ctrl_c_ends_a_run_with_130(tiny_folder):
    process = deltaic_process("run", str(tiny_folder), "hi", "--max-new-tokens", "1900", *RAMBLING)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_chat_keeps_the_conversation(tiny_folder, tmp_path, picture, run, monkeypatch):
    seen = []
    start = deltaic.Model._start

    def spy(self, messages, *rest, **options):
        stream = start(self, messages, *rest, **options)
        seen.append(messages)
        return stream

    monkeypatch.setattr(deltaic.Model, "_start", spy)
    lines = tmp_path / "lines.txt"
    said = ["one", "", f"/image {picture}", "two", "/image missing.png", "/unknown", "bad <|image_pad|>", "three"]
    lines.write_text("\n".join([*said, "/reset", "four", "/exit", "five", ""]))
    code, out, err = run("chat", tiny_folder, "--max-new-tokens", 4, *REFERENCE, stdin=lines)
    assert code == 0
    pair = ["user", "assistant"]
    assert [[m["role"] for m in messages] for messages in seen] == [
        [*turns, "user"] for turns in ([], pair, 2 * pair, [])
    ]
    assert seen[1][-1]["content"][0]["image"].num_tokens > 0
    assert seen[2][-1]["content"] == "three"  # the refused turn left no trace
    assert "missing.png: no such picture file" in err
    assert "/unknown: unknown" in err
    assert err.count("tokens/s") == 4
    assert "Traceback" not in err
    assert len(out.splitlines()) >= 4


def test_ctrl_c_stops_an_answer_not_the_conversation(tiny_folder):
    process = deltaic_process("chat", str(tiny_folder), "--max-new-tokens", "1500", *RAMBLING, stdin=subprocess.PIPE)
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/exit\n")
    process.stdin.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert "Traceback" not in err
    assert "new tokens" in err


def write(path, content=b""):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "{folder}"],
        ["run", "{folder}", ""],
        ["run", "{folder}", "hi", "--temperature", "nan"],
        ["run", "{folder}", "hi", "--temperature", "hot"],
        ["run", "{folder}", "hi", "--top-k", "-1"],
        ["run", "{folder}", "hi", "--top-k", "1.5"],
        ["run", "{folder}", "hi", "--top-p", "0"],
        ["run", "{folder}", "hi", "--seed", "-3"],
        ["run", "{folder}", "hi", "--stop", ""],
        ["run", "{folder}", "hi", "--max-new-tokens", "0"],
        ["run", "{folder}", "hi", "--max-new-tokens", "100000"],
        ["run", "{folder}", "hi", "--no-such-flag"],
        ["run", "{folder}", "hi", "more"],
        ["run", "{folder}", "hi", "--dtype", "fp8"],
        ["run", "{folder}", "hi", "--device", "cuda"],
        ["run", "{folder}", "hi", "--device", "tpu"],
        ["run", "{folder}", "hi", "--threads", "0"],
        ["run", "{folder}", "hi", "--image", "/no/such.png"],
        ["run", "{folder}", "hi", "--image", "{folder}"],
        ["run", "{folder}", "hi", "--image", "{empty}"],
        ["run", "{folder}", "hi", "--image", "https://example.invalid/cat.png"],
        ["run", "{folder}", "a <|image_pad|> of nothing"],
        ["run", "{folder}", "long " * 3000],
        ["run", "/no/such/folder", "hi"],
        ["run", "{empty}", "hi"],
        ["run", "{bare}", "hi"],
        ["chat", "/no/such/folder"],
        ["demo", "--image", "/no/such.png"],
        ["info", "/no/such/folder"],
        ["info", "{bare}"],
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(run, tiny_folder, tmp_path, arguments):
    (tmp_path / "bare").mkdir()
    names = {"folder": tiny_folder, "empty": write(tmp_path / "empty"), "bare": tmp_path / "bare"}
    arguments = [a.format(**names) for a in arguments]
    if arguments[:1] == ["run"] and "--device" not in arguments:
        arguments += REFERENCE[:2]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("deltaic: ")


def test_text_that_is_not_utf8_is_a_user_error(tiny_folder):
    process = deltaic_process("run", str(tiny_folder), *REFERENCE, stdin=subprocess.PIPE)
    out, err = process.communicate(b"caf\xe9", timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert b"0xe9 at 3" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [None, "run", "chat", "demo", "info"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"] if command else ["--help"])
    out, _ = capsys.readouterr()
    assert caught.value.code == 0
    assert "examples:" in out
    assert "deltaic" in out


def test_version(run):
    assert run("--version") == (0, f"deltaic {deltaic.__version__}\n", "")


def test_info_of_a_checkpoint(run, tiny_folder):
    code, out, _ = run("info", tiny_folder, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["deltaic"]["version"] == deltaic.__version__
    assert facts["deltaic"]["isa"]
    assert facts["deltaic"]["threads"] >= 1
    model = facts["model"]
    assert model["architecture"] == "Qwen3_5ForConditionalGeneration"
    assert model["file_bytes"] == 4 * model["parameters"]
    assert 0 < model["vision_parameters"] < model["parameters"]
    assert model["mtp_parameters"] == 0
    assert model["stored_as"] == "F32"
    code, out, _ = run("info", tiny_folder)
    assert code == 0
    assert "3 gated delta net, 1 gated attention" in out


def test_demo_looks_at_the_bundled_picture(run, tiny_folder, tmp_path, picture, monkeypatch):
    """On a stand-in for the miniature; that the answers are right is the miniature's own test."""
    folder = shutil.copytree(tiny_folder, tmp_path / "miniature")
    tiny.write_json(folder / "generation_config.json", {"do_sample": False, "max_new_tokens": 5})
    (folder / "pictures").mkdir()
    bundled = shutil.copy(picture, folder / "pictures" / "two.png")
    monkeypatch.setattr("deltaic.cli.answer.MINIATURE", folder)
    for arguments, image, question in (
        ([], bundled, cli.DEMO_QUESTION),
        (["--image", picture, "How many?"], picture, "How many?"),
    ):
        code, out, err = run("demo", *arguments, *REFERENCE)
        assert code == 0
        assert out.startswith(f"picture:  {image}\nquestion: {question}\nanswer:   ")
        assert "tokens/s" in err
