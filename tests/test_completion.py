"""``nanovllm completion``: the scripts, run by the shells they are for."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pseudo_terminal import PseudoTerminal

from nanovllm.config import EngineArgs
from nanovllm.entrypoints.cli.completion import SHELLS
from nanovllm.entrypoints.cli.flags import METAVARS
from nanovllm.entrypoints.cli.main import COMMANDS, main
from nanovllm.errors import ParameterError

# words typed -> what completes the last of them
EXPECTED = {
    "nanovllm ": set(COMMANDS),
    "nanovllm c": {"chat", "collect-env", "complete", "completion"},
    "nanovllm generate --dty": {"--dtype"},
    "nanovllm generate --dtype f": {"float16", "float32"},
    "nanovllm generate --no-ig": {"--no-ignore-eos"},
    "nanovllm chat --system-prompt bench --sto": {"--stop", "--stop-token-ids"},
    "nanovllm bench ": {"latency", "serve", "startup", "throughput"},
    "nanovllm bench throughput --back": {"--backend"},
    "nanovllm bench throughput --backend ": {"vllm", "nanovllm"},
    "nanovllm bench latency --back": set(),
    "nanovllm bench latency --use-b": {"--use-beam-search"},
    "nanovllm bench latency --swap": set(),  # taken, but not advertised
    "nanovllm d": {"doctor"},
    "nanovllm doctor --device ": {"auto", "cpu", "cuda", "npu"},
    "nanovllm completion ": set(SHELLS),
}

needs = {shell: pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed") for shell in SHELLS}


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@needs["bash"]
def test_bash_completes_commands_options_and_values(capsys: pytest.CaptureFixture[str]):
    # What readline would do: fill COMP_WORDS and call the function.
    ask = "".join(
        "COMP_WORDS=(" + (f"{line}''" if line.endswith(" ") else line) + "); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n"
        '_nanovllm; echo "${COMPREPLY[*]}"\n'
        for line in EXPECTED
    )
    code = script("bash", capsys) + ask + "complete -p nanovllm\n"
    done = subprocess.run(["bash", "--norc"], input=code, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    *answers, registered = done.stdout.splitlines()
    for (line, expected), answer in zip(EXPECTED.items(), answers, strict=True):
        assert set(answer.split()) == expected, line
    assert registered == "complete -o default -F _nanovllm nanovllm"


@needs["fish"]
def test_fish_completes_commands_options_and_values(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "nanovllm.fish"
    file.write_text(script("fish", capsys))
    (tmp_path / "prompts.txt").touch()
    asks = [*EXPECTED, "nanovllm generate --file prom"]
    code = "; echo ---; ".join([f"source {file}", *(f"complete -C '{line}'" for line in asks)])
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    answers = [{line.split("\t")[0] for line in part.splitlines()} for part in done.stdout.split("---\n")[1:]]
    for (line, expected), answer in zip(EXPECTED.items(), answers, strict=False):
        if line.endswith((" ", "--sto")) or expected:
            assert answer == expected, line
        else:
            assert not answer, line
    assert answers[-1] == {"prompts.txt"}


INTERACTIVE = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source {file}\r"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; source {file}\r"),
}


@pytest.mark.parametrize("shell", [pytest.param(shell, marks=needs[shell]) for shell in INTERACTIVE])
def test_the_tab_key_completes(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "script"
    file.write_text(script(shell, capsys))
    (tmp_path / "my prompts.txt").touch()
    command, setup = INTERACTIVE[shell]
    with PseudoTerminal(command, {**os.environ, "HOME": str(tmp_path)}, stderr_too=True) as terminal:
        terminal.type(f"cd {tmp_path}; " + setup.format(file=file))
        # `nanovllm` is a function here that says what it was called with.
        terminal.type('nanovllm() { for word in "$@"; do echo "<$word>"; done; }; echo rea""dy\r')
        end = terminal.wait_for_screen("ready\r\n")
        value = ["--load-format=dummy"] if shell == "zsh" else ["--load-format", "dummy"]
        for keys, words in [
            ("nanovllm gen\t--load\tdum\t\r", ["generate", *value]),
            ("nanovllm bench la\t--use-b\t\r", ["bench", "latency", "--use-beam-search"]),
            ("nanovllm bench throughput --backend=na\t\r", ["bench", "throughput", "--backend=nanovllm"]),
            ("nanovllm generate --file my\t\r", ["generate", "--file", "my prompts.txt"]),
        ]:
            terminal.type(keys)
            end = terminal.wait_for_screen("".join(f"<{word}>\r\n" for word in words), end)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_holds_no_more_than_the_help_shows(shell: str, capsys: pytest.CaptureFixture[str]):
    text = script(shell, capsys)
    assert "max-model-len" in text
    assert "swap-space" not in text
    assert "SUPPRESS" not in text and "%%" not in text


def test_a_script_is_made_without_heavy_libraries(tmp_path: Path):
    for library in ("torch", "numpy", "tqdm", "tokenizers", "jinja2"):
        (tmp_path / f"{library}.py").write_text(f"raise ImportError('{library} was imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "nanovllm", "completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "_nanovllm()" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("name", [name for name, metavar in METAVARS.items() if metavar.startswith("{")])
def test_listed_values_are_accepted(name: str):
    assert name in {field.name for field in dataclasses.fields(EngineArgs)}
    for value in METAVARS[name].strip("{}").split(","):
        try:
            EngineArgs(**{"model": "demo", "load_format": "dummy", name: value}).build()
        except ParameterError as error:  # some need a device that is not here
            assert "must be one of" not in str(error)


def test_an_unknown_shell_is_answered_in_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["completion", "tcsh"]) == 2
    assert "'tcsh' (choose from" in capsys.readouterr().err
