"""``nanovllm completion``: a script that completes the command in bash, zsh or fish.

The script is made of the parsers, and asks no program when a key is pressed. It completes commands, options, and
values: those that a parser lists, as ``choices`` or a metavar ``{a,b}``, and file names for everything else.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class Option:
    """An option, under all its names.

    Attributes:
        takes_value: whether the next word is its value.
        values: what the value may be; empty if that cannot be listed.
        repeats: whether it can be given several times.
    """

    names: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...]
    repeats: bool


@dataclass(slots=True)
class Command:
    """A command, such as ``bench throughput``, and what may follow it; the name of the whole program is empty.

    Attributes:
        words: what may follow that is no option: word -> its help.
    """

    name: str
    options: list[Option] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog = 'For this shell only: eval "$(nanovllm completion bash)"; docs/cli.md says how to keep it.'
    parser.add_argument("shell", choices=SHELLS, help="the shell the script is for")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    from nanovllm.entrypoints.cli.main import COMMANDS, make_parser

    writers: dict[str, Callable[[list[Command]], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    print("\n".join(writers[arguments.shell](list(describe(make_parser(COMMANDS))))))
    return 0


def describe(parser: argparse.ArgumentParser, name: str = "") -> Iterator[Command]:
    """A parser and the parsers of its commands, outermost first. What its help does not show is left out."""
    command = Command(name)
    inner = []
    for action in parser._actions:  # argparse has no public way to list them
        if action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for word, subparser in action.choices.items():
                command.words[word] = helps.get(word, "")
                inner.append((f"{name} {word}".strip(), subparser))
        elif action.option_strings:
            takes_value = action.nargs is None or action.nargs not in (0, "?")
            command.options.append(
                Option(
                    tuple(action.option_strings),
                    (action.help or "").replace("%%", "%"),
                    takes_value,
                    _values(action) if takes_value else (),
                    isinstance(action, argparse._AppendAction),
                )
            )
        else:
            command.words.update(dict.fromkeys(_values(action), ""))
    yield command
    for path, subparser in inner:
        yield from describe(subparser, path)


def _values(action: argparse.Action) -> tuple[str, ...]:
    if action.choices is not None:
        return tuple(map(str, action.choices))
    if isinstance(action.metavar, str) and action.metavar.startswith("{"):
        return tuple(action.metavar.strip("{}").split(","))
    return ()


def _steps(commands: list[Command]) -> Iterator[tuple[str, str]]:
    """("command so far" + space + next word, the command they make), by which a script finds where it is."""
    for command in commands:
        outer, _, word = command.name.rpartition(" ")
        if word:
            yield f"{outer} {word}", command.name


# -- bash --------------------------------------------------------------------------------------------------------------


def _bash(commands: list[Command]) -> Iterator[str]:
    """Where nothing is offered, ``-o default`` completes file names."""
    yield "# Completes nanovllm in bash. Made by: nanovllm completion bash"
    yield "_nanovllm() {"
    yield '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"'
    yield '    local command="" words="" options="" index'
    yield "    # --option=value arrives as three words"
    yield '    if [[ $current == "=" ]]; then current=""'
    yield '    elif [[ $previous == "=" ]]; then previous="${COMP_WORDS[COMP_CWORD-2]}"; fi'
    yield "    for ((index = 1; index < COMP_CWORD; index++)); do"
    yield '        case "$command ${COMP_WORDS[index]}" in'
    for step, name in _steps(commands):
        yield f'            "{step}") command="{name}" ;;'
    yield "        esac"
    yield "    done"
    yield "    COMPREPLY=()"
    yield '    case "$command" in'
    for command in commands:
        yield f'    "{command.name}")'
        yield '        case "$previous" in'
        for option in command.options:
            if option.takes_value:
                names = "|".join(option.names)
                words = shlex.quote(" ".join(option.values))
                yield f'        {names}) COMPREPLY=($(compgen -W {words} -- "$current")); return ;;'
        yield "        esac"
        yield f"        words={shlex.quote(' '.join(command.words))}"
        yield f"        options={shlex.quote(' '.join(name for option in command.options for name in option.names))}"
        yield "        ;;"
    yield "    esac"
    yield '    if [[ $current == -* ]]; then words="$options"; fi'
    yield '    COMPREPLY=($(compgen -W "$words" -- "$current"))'
    yield "}"
    yield "complete -o default -F _nanovllm nanovllm"


# -- zsh ---------------------------------------------------------------------------------------------------------------


def _zsh(commands: list[Command]) -> Iterator[str]:
    """Either a file ``_nanovllm`` in the function path, or evaluated after ``compinit``."""
    yield "#compdef nanovllm"
    yield "# Completes nanovllm in zsh. Made by: nanovllm completion zsh"
    yield "_nanovllm() {"
    yield '    local command="" index'
    yield "    for ((index = 2; index < CURRENT; index++)); do"
    yield '        case "$command ${words[index]}" in'
    for step, name in _steps(commands):
        yield f'            "{step}") command="{name}" ;;'
    yield "        esac"
    yield "    done"
    yield '    case "$command" in'
    for command in commands:
        yield f'    "{command.name}")'
        yield "        _arguments \\"
        for option in command.options:
            for name in option.names:
                yield f"            {_zsh_option(name, option)} \\"
        words = " ".join(rf"{word}\:{_zsh_text(text)}" for word, text in command.words.items())
        yield f"            {shlex.quote(f'*:word:(({words}))' if words else '*:file:_files')}"
        yield "        ;;"
    yield "    esac"
    yield "}"
    yield 'if [[ "${funcstack[1]}" == _nanovllm ]]; then _nanovllm "$@"; else compdef _nanovllm nanovllm; fi'


def _zsh_option(name: str, option: Option) -> str:
    repeats = "*" if option.repeats else ""
    equals = "=" if option.takes_value and name.startswith("--") else ""
    help_text = "".join("\\" + c if c in "[]:\\" else c for c in option.help)
    action = ""
    if option.takes_value:
        action = ":value:" + (f"({' '.join(option.values)})" if option.values else "_files")
    return shlex.quote(f"{repeats}{name}{equals}[{help_text}]{action}")


def _zsh_text(text: str) -> str:
    return "".join("\\" + c if c in " ():\\'\"" else c for c in text)


# -- fish --------------------------------------------------------------------------------------------------------------


def _fish(commands: list[Command]) -> Iterator[str]:
    yield "# Completes nanovllm in fish. Made by: nanovllm completion fish"
    yield "function __nanovllm_at"
    yield '    set -l command ""'
    yield "    for word in (commandline -opc)"
    yield '        switch "$command $word"'
    for step, name in _steps(commands):
        yield f'            case "{step}"'
        yield f'                set command "{name}"'
    yield "        end"
    yield "    end"
    yield '    test "$command" = "$argv[1]"'
    yield "end"
    for command in commands:
        at = f"complete -c nanovllm -n '__nanovllm_at \"{command.name}\"'"
        if command.words:
            yield f"{at} -f"
        for word, text in command.words.items():
            yield f"{at} -a {word} -d {_fish_text(text)}"
        for option in command.options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" if len(n) == 2 else f"-o {n[1:]}"
                             for n in option.names)  # fmt: skip
            value = ""
            if option.takes_value:
                value = f" -x -a {_fish_text(' '.join(option.values))}" if option.values else " -r -F"
            yield f"{at} {names}{value} -d {_fish_text(option.help)}"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
