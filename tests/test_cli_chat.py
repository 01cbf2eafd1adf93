"""``nanovllm chat``, at a pseudo-terminal as people use it, and through pipes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pseudo_terminal import PseudoTerminal
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

import nanovllm
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.entrypoints.cli.conversation import Conversation, Message
from nanovllm.entrypoints.cli.main import main
from nanovllm.errors import ParameterError

ROOT = Path(nanovllm.__file__).parents[1]
VOCAB_SIZE, IM_END = 337, 332  # of tiny_tokenizers.qwen
COMMAND = [sys.executable, "-m", "nanovllm"]
LONG = "The quick brown fox jumps over the lazy dog, and the small engine answers questions about it all day long."
STATS = re.compile(rb"TTFT \d+\.\d{3} s, (\d+) tokens; prompt (\d+) tokens, (\d+) from the cache\]\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "qwen3", vocab_size=VOCAB_SIZE, eos_token_id=IM_END, max_position_embeddings=8192)
    return qwen(folder)


@pytest.fixture
def chat(model: Path) -> list[str]:
    """A chat whose answers are as long as they may be, and always the same."""
    options = ["--temperature", "0", "--ignore-eos", "--kv-cache-memory-bytes", "64M", "--stats"]
    return [*COMMAND, "chat", "--model", str(model), *options]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "LC_ALL": "C.UTF-8",
    }


def prompt_len(model: Path, *contents: str, system: str | None = None) -> int:
    """Tokens of the prompt that a conversation makes: question, answer, question ..."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return len(Tokenizer.load(model).apply_chat_template(messages, add_generation_prompt=True))


def stats(line: bytes) -> tuple[int, int, int]:
    """(tokens of the answer, of the prompt, of these from the cache)"""
    match = STATS.search(line)
    assert match is not None, line
    return int(match[1]), int(match[2]), int(match[3])


def run(command: list[str], env: dict[str, str], stdin: bytes) -> tuple[int, str, str]:
    done = subprocess.run(command, input=stdin, capture_output=True, env=env, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# -- at a terminal -----------------------------------------------------------------------------------------------------


def test_a_conversation_at_a_terminal(chat: list[str], model: Path, env: dict[str, str], tmp_path: Path):
    with PseudoTerminal([*chat, "--max-tokens", "7000"], env) as terminal:
        terminal.wait_for_error("context of 8192 tokens. /help lists commands")
        terminal.wait_for_screen("> ")

        # Ctrl-C in the middle of an answer stops the answer.
        terminal.type(f"{LONG}\r")
        start = terminal.wait_for_screen(f"{LONG}\r\n")
        terminal.wait_for_more(40)
        terminal.type("\x03")
        error = terminal.wait_for_error("]\n")
        assert b"(stopped)\n" in terminal.errors
        num_tokens, num_prompt_tokens, _ = stats(terminal.errors)
        assert num_prompt_tokens == prompt_len(model, LONG) and 0 < num_tokens < 7000
        end = terminal.wait_for_screen("\n> ", start)
        shown = terminal.screen[start:end].decode().replace("^C", "", 1).replace("\r\n", "\n")
        partial = shown.removesuffix("\n> ")
        assert len(partial) >= 10

        # The next question's prompt holds the first one and what there is of its answer; its prefix is in the cache.
        terminal.type("why?\r")
        terminal.wait_for_screen("why?\r\n", end)
        terminal.wait_for_more(10)
        terminal.type("\x03")
        before, error = error, terminal.wait_for_error("]\n", error)
        _, num_prompt_tokens, num_cached_tokens = stats(terminal.errors[before:error])
        assert num_prompt_tokens == prompt_len(model, LONG, partial, "why?")
        assert num_cached_tokens >= prompt_len(model, LONG) // 16 * 16 - 16 > 0
        end = terminal.wait_for_screen("\n> ", end)

        # Nothing of this is sent to the model.
        for typed, answer in [
            (b"caf\xe9\xe9\r", "the message is not UTF-8 text (position 3); it was not sent\n"),
            (b"half a line", ""),
            (b"\x03", "(Ctrl-D or /exit ends the program)\n"),
            (b"/hlep\r", "(there is no command /hlep; did you mean /help?)\n"),
            (b"/help\r", "/exit   end the program"),
            (b"/new\r", "(a new conversation)\n"),
            (b"/retry\r", "(there is nothing to answer yet)\n"),
            (b"  \r", ""),
        ]:
            terminal.type(typed)
            error = terminal.wait_for_error(answer, error)
            end = terminal.wait_for_screen("> " if answer else typed.decode().strip(), end)
            time.sleep(0.1)  # until readline waits: a Ctrl-C between prompt and waiting is only seen at the next key
        assert terminal.errors.count(b"]\n") == 2

        # After /new the conversation is empty. Backspace edits the line.
        terminal.type("hellp\x7fo\r")
        end = terminal.wait_for_screen("o\r\n", end)
        terminal.wait_for_more(10)
        terminal.type("\x03")
        before, error = error, terminal.wait_for_error("]\n", error)
        assert stats(terminal.errors[before:error])[1] == prompt_len(model, "hello")
        terminal.wait_for_screen("\n> ", end)
        terminal.type("\x04")
        assert terminal.wait() == 0
        assert b"Traceback" not in terminal.errors
    lines = (tmp_path / "state" / "nanovllm" / "chat_history").read_text(errors="replace").splitlines()
    assert lines[:2] == [LONG, "why?"] and lines[-1] == "hello"
    with PseudoTerminal(chat, env) as terminal:  # the history outlives the program
        terminal.wait_for_screen("> ")
        terminal.type("\x10\x10\x15/exit\r")  # Ctrl-P twice, then delete the line
        assert terminal.wait() == 0
        assert b"hello" in terminal.screen


def test_a_terminal_without_readline_or_a_place_for_its_history(
    chat: list[str], model: Path, env: dict[str, str], tmp_path: Path
):
    (tmp_path / "readline.py").write_text("raise ImportError('no readline')")
    env["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from nanovllm.entrypoints.cli.main import main; "
    command = [sys.executable, "-c", script + "raise SystemExit(main())", *chat[len(COMMAND) :]]
    with PseudoTerminal([*command, "--max-model-len", "200", "--max-tokens", "4"], env, stderr_too=True) as terminal:
        terminal.wait_for_screen("> ")
        terminal.type(f"{LONG * 4}\n")  # answered, and not the end
        end = terminal.wait_for_screen("the message is too long: with it alone the prompt has")
        end = terminal.wait_for_screen("> ", end)
        terminal.type(b"caf\xe9\n")
        end = terminal.wait_for_screen("the message is not UTF-8 text (position 3); it was not sent", end)
        terminal.type("hello\n")
        end = terminal.wait_for_screen("from the cache]", end)
        assert f"prompt {prompt_len(model, 'hello')} tokens".encode() in terminal.screen
        terminal.wait_for_screen("> ", end)
        terminal.type("\x04")
        assert terminal.wait() == 0
        assert b"Traceback" not in terminal.screen
    assert not (tmp_path / "state").exists()

    env["XDG_STATE_HOME"] = "/dev/null/nowhere"
    with PseudoTerminal(chat, env, stderr_too=True) as terminal:
        terminal.wait_for_screen("> ")
        terminal.type("/quit\r")
        assert terminal.wait() == 0
        assert b"Traceback" not in terminal.screen


# -- through pipes -----------------------------------------------------------------------------------------------------


def test_each_line_of_a_pipe_is_a_message(chat: list[str], model: Path, env: dict[str, str]):
    process = subprocess.Popen(
        [*chat, "--max-tokens", "12", "--system-prompt", "be brief"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, bufsize=0,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write("hello 世界\r\n\n".encode())
    _, num_prompt_tokens, _ = stats(process.stderr.readline())  # answered before there is another line
    assert num_prompt_tokens == prompt_len(model, "hello 世界", system="be brief")
    first = process.stdout.read(65536).decode().removesuffix("\n")
    process.stdin.write(b"and then?\n")
    assert stats(process.stderr.readline())[1] == prompt_len(model, "hello 世界", first, "and then?", system="be brief")
    second = process.stdout.read(65536).decode()
    process.stdin.write(b"/retry\n")
    assert stats(process.stderr.readline())[1] == prompt_len(model, "hello 世界", first, "and then?", system="be brief")
    assert process.stdout.read(65536).decode() == second
    process.stdin.write(b"/exit\nnot answered\n")
    process.stdin.close()
    assert process.wait() == 0
    assert process.stdout.read() == b"" and process.stderr.read() == b""
    process.stdout.close()
    process.stderr.close()


def test_a_line_that_is_not_utf8_ends_a_pipe_with_one_message(chat: list[str], env: dict[str, str]):
    code, stdout, stderr = run([*chat, "--max-tokens", "3"], env, b"hello\ncaf\xe9\nnot answered\n")
    assert code == 2 and stdout.count("\n") >= 1
    speed, error, rest = stderr.split("\n")
    assert STATS.search(f"{speed}\n".encode()) and rest == ""
    assert error == (
        "nanovllm: error: line 2 of standard input is not UTF-8 text: byte 0xe9 at position 3; convert it first"
    )


def test_a_history_that_outgrows_the_context_loses_its_oldest_turns(chat: list[str], env: dict[str, str]):
    lines = b"The dog was not amused.\n" * 12
    code, _, stderr = run([*chat, "--max-model-len", "128", "--max-tokens", "16"], env, lines)
    assert code == 0
    lengths = [stats(f"{line}\n".encode())[1] for line in stderr.splitlines() if line.startswith("[")]
    assert len(lengths) == 12 and max(lengths) <= 112
    notices = [line for line in stderr.splitlines() if not line.startswith("[")]
    assert 1 <= len(notices) <= 6
    assert all(re.fullmatch(r"\(the context is full: [1-9] of the oldest turns are forgotten\)", n) for n in notices)


def test_a_closed_pipe_ends_the_chat_quietly(chat: list[str], env: dict[str, str]):
    process = subprocess.Popen(
        [*chat, "-q", "x", "--max-tokens", "8000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, bufsize=0
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_a_chat_that_nobody_types(chat: list[str], env: dict[str, str]):
    process = subprocess.Popen(
        [*chat, "--max-tokens", "8000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, bufsize=0,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"x\n")
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and errors == b""


def test_one_message_is_answered_as_generate_answers_it(chat: list[str], env: dict[str, str]):
    code, answer, stderr = run([*chat, "-q", "hello", "--max-tokens", "9"], env, b"not read\n")
    assert code == 0 and stats(stderr.encode())[0] == 9
    options = chat[len(COMMAND) + 1 : -1]
    assert run([*COMMAND, "generate", "hello", *options, "--max-tokens", "9"], env, b"") == (0, answer, "")


def test_closed_standard_input_is_answered_in_one_line(chat: list[str], env: dict[str, str]):
    code, stdout, stderr = run(["sh", "-c", f"exec {shlex.join(chat)} <&-"], env, b"")
    assert (code, stdout, stderr) == (2, "", "nanovllm: error: standard input is closed\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--url", "http://localhost:8000/v1", "--dtype", "bfloat16"], "--dtype concerns an engine in this process"),
        (["-q", " "], "--quick: the message is empty"),
        (["-q", "caf\udce9"], "the message is not UTF-8 text (position 3)"),
        (["--system-prompt", "\udce9"], "--system-prompt is not UTF-8 text (position 0)"),
        (["-q", "x", "--top-p", "0"], "top_p must be in (0, 1]"),
        (["-q", "x", "--n", "2"], "there is no option --n"),
        (["hello"], "'hello' is one argument too many"),
    ],
    ids=lambda value: ascii(" ".join(value)) if isinstance(value, list) else None,
)
def test_a_mistake_is_answered_before_a_model_is_loaded(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["chat", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"nanovllm: error: {part}") and captured.err.count("\n") == 1


def test_a_model_that_cannot_chat_is_refused_before_anybody_types(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    options = ["--model", str(folder), "--kv-cache-memory-bytes", "16M"]
    for more, part in ([], "has no chat template"), (["--skip-tokenizer-init"], "a chat needs a tokenizer"):
        assert main(["chat", *options, *more]) == 2
        assert part in capsys.readouterr().err


# -- what is remembered ------------------------------------------------------------------------------------------------


def words(messages: list[Message]) -> tuple[dict[str, list[int]], int]:
    """A prompt with a token per word, and two around each message."""
    ids = [ord(word[0]) for message in messages for word in ["<", *message["content"].split(), ">"]]
    return {"prompt_token_ids": [*ids, ord("<")]}, len(ids) + 1


def test_turns_are_forgotten_oldest_first_and_some_ahead():
    conversation = Conversation(words, context=40, answer_len=8, system_prompt="S")
    forgotten = []
    for letter in "abcdefgh":
        prompt, count = conversation.ask(f"{letter} {letter}")
        ids = "".join(map(chr, prompt["prompt_token_ids"]))
        assert len(ids) <= 32  # room for an answer of 8
        assert ids.startswith("<S>") and ids.endswith(f"<{letter}{letter}><")
        forgotten.append(count)
        conversation.answer("y")
    # A turn is 7 tokens, and 8 are around the newest: a fourth turn fits, and a fifth takes more than one away.
    assert forgotten[:4] == [0, 0, 0, 0] and max(forgotten) >= 2
    assert all(not (a and b) for a, b in itertools.pairwise(forgotten))


def test_a_question_that_cannot_be_asked_changes_nothing():
    conversation = Conversation(words, context=16, answer_len=None)
    conversation.ask("a")
    conversation.answer("b")
    with pytest.raises(ParameterError, match="with it alone the prompt has 23 tokens, and the context is 16"):
        conversation.ask("x " * 20)
    assert conversation.turns == [("a", "b")]
    prompt, forgotten = conversation.ask("c " * 12)  # takes the room for an answer, but not all of the context
    assert len(prompt["prompt_token_ids"]) == 15 and forgotten == 1


def test_a_turn_is_taken_back():
    conversation = Conversation(words, context=100)
    assert conversation.take_back() is None
    conversation.ask("a")
    conversation.answer("b")
    conversation.ask("c")
    conversation.answer("d")
    assert conversation.take_back() == "c" and conversation.turns == [("a", "b")]
    conversation.clear()
    prompt, _ = conversation.ask("e")
    assert "".join(map(chr, prompt["prompt_token_ids"])) == "<e><"
