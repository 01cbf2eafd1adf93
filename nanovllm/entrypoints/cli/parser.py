"""argparse with vLLM's conventions.

``_`` and ``-`` are the same in the name of an option, switches come as ``--x`` and ``--no-x``, and whole numbers may be
written for people: ``1k`` is 1,000, ``1K`` is 1,024. An option whose value is a JSON object takes single keys as well,
``--hf-overrides.rope_scaling.factor 4``; ``--help=WORD`` shows a part of the help; the file of ``--config`` is read
where a parser has that option (`add_config_flag`).
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_SUFFIXES = {
    letter: base**power
    for power, letters in enumerate(("kK", "mM", "gG", "tT"), start=1)
    for letter, base in zip(letters, (1000, 1024), strict=True)
}


class UsageError(ValueError):
    """The command line is not understood."""


class CommandParser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of ending the process, and suggests what may have been meant."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation would change its meaning with the next option that begins like it.
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_args(_dashes(args), namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None, **more: Any) -> Any:
        # All this happens here, where the options of the subcommand are known, rather than before or after all parsers.
        args = list(args)
        if self._subparsers is None:
            self._help_on_a_word(args)
            args = [*self._from_config_file(args), *self._without_dots(args)]
        namespace, unknown = super().parse_known_args(args, namespace, **more)
        if unknown:
            first = unknown[0]
            if first.startswith("-"):
                hint = suggestion(first.split("=")[0], self._option_string_actions)
                self.error(f"there is no option {first}{hint}")
            hint = ", give a model as --model" if "--model" in self._option_string_actions else ""
            self.error(f"{first!r} is one argument too many; quote an argument that contains spaces{hint}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _help_on_a_word(self, args: Sequence[str]) -> None:
        """Print what ``--help=WORD`` asks for, and end: a group of options, or those whose name has the word in it."""
        words = [argument[len("--help=") :] for argument in _options(args) if argument.startswith("--help=")]
        if not words:
            return
        word = words[0].strip().lower()
        groups = {str(group.title).lower(): group for group in self._action_groups if group._group_actions}
        if word == "all":
            self.print_help()
            raise SystemExit(0)
        if word in groups:
            actions = groups[word]._group_actions
        else:
            name = word.replace("_", "-").lstrip("-")
            actions = [a for a in self._actions if any(name in option for option in a.option_strings)]
        actions = [action for action in actions if action.help != argparse.SUPPRESS]
        if not actions:
            names = [*groups, *(option.lstrip("-") for option in self._option_string_actions)]
            hint = suggestion(word, names) or f"; groups are {', '.join(groups)}"
            self.error(f"--help={words[0]}: no group and no option has that name{hint}")
        formatter = self._get_formatter()
        formatter.start_section(str(groups[word].title) if word in groups else "options")
        formatter.add_arguments(actions)
        formatter.end_section()
        sys.stdout.write(formatter.format_help())
        raise SystemExit(0)

    def _from_config_file(self, args: Sequence[str]) -> list[str]:
        """The options in the file of ``--config``, but for those that the command line gives itself."""
        if "--config" not in self._option_string_actions:
            return []
        file = _value_of("--config", args)
        if file is None:
            return []
        from nanovllm.entrypoints.cli.config_file import read_config_file

        taken = {action.dest for word in _options(args) if (action := self._action_of(word)) is not None}
        return read_config_file(file, self._option_string_actions, taken)

    def _action_of(self, word: str) -> argparse.Action | None:
        """Whose option a word is: ``--port``, ``--port=8000``, ``-tp`` or ``-O2``."""
        known = self._option_string_actions
        return known.get(word.split("=")[0]) or (None if word.startswith("--") else known.get(word[:2]))

    def _without_dots(self, args: Sequence[str]) -> list[str]:
        """``--option.outer.inner value`` as ``--option {"outer": {"inner": value}}``."""
        result: list[str] = []
        rest = list(args)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                return [*result, argument, *rest]
            name, equals, value = argument.partition("=")
            option, dot, path = name.partition(".")
            if dot and isinstance(self._option_string_actions.get(option), MergeJson):
                keys = path.split(".")
                if not all(keys):
                    self.error(f"{name}: a key is missing between the dots")
                if not equals:
                    if not rest:
                        self.error(f"{name}: its value is missing")
                    value = rest.pop(0)
                tree: Any = _json_or_text(value)
                for key in reversed(keys):
                    tree = {key: tree}
                result.append(f"{option}={json.dumps(tree)}")
            else:
                result.append(argument)
        return result


class MergeJson(argparse.Action):
    """The value is a JSON object; given again, or key by key, objects are laid over each other."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"type": json_object, "metavar": "JSON", **settings})

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, _laid_over(getattr(namespace, self.dest, None) or {}, values))


def add_config_flag(parser: CommandParser) -> None:
    """``--config FILE`` for the options of a command."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file with options of this command (key: value); the command line wins over it",
    )


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean ...?"`` for a word close to a known one, else nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def human_int(text: str) -> int:
    """A whole number: ``4096``, ``1k`` = 1000, ``1K`` = 1024, ``25.6k`` = 25600; so too m/M, g/G, t/T.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    match = re.fullmatch(r"([+-]?\d+)|([+-]?\d+(?:\.\d+)?)([kKmMgGtT])", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 4096, 4k (4000) or 4K (4096)")
    plain, number, suffix = match.groups()
    return int(plain) if plain else round(float(number) * _SUFFIXES[suffix])


def json_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        argparse.ArgumentTypeError: not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"key": 1}}')
    return value


def _dashes(arguments: Sequence[str]) -> list[str]:
    """``--max_tokens=8`` as ``--max-tokens=8``, up to a bare ``--``. What follows a dot is a key, and stays."""
    result = list(arguments)
    for index, argument in enumerate(result):
        if argument == "--":
            break
        if argument.startswith("--"):
            match = re.match(r"[^.=]*", argument)
            assert match is not None
            result[index] = match[0].replace("_", "-") + argument[match.end() :]
    return result


def _options(arguments: Sequence[str]) -> list[str]:
    """The words that look like options, up to a bare ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [argument for argument in arguments[:end] if argument.startswith("-")]


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value given to an option; None if there is none."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == option and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(option + "="):
            found = argument[len(option) + 1 :]
    return found


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = _laid_over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
