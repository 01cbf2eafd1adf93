"""A model behind an OpenAI-compatible server, for the commands that converse and complete."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nanovllm.entrypoints.cli.answers import Piece, Pieces
from nanovllm.entrypoints.cli.parser import UsageError

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://localhost:8000/v1"
_CONNECT_TIMEOUT = 10.0  # seconds; an answer may take as long as it likes


class TooLongError(UsageError):
    """The server says that the prompt does not fit its context."""


def add_remote_flags(parser: argparse.ArgumentParser) -> None:
    """Options that choose a server instead of a model in this process."""
    group = parser.add_argument_group("server", "Ask a running server instead of running the model in this process.")
    group.add_argument(
        "--url",
        nargs="?",
        const=DEFAULT_URL,
        metavar="URL",
        help=f"of the server's API (without a value {DEFAULT_URL})",
    )
    group.add_argument("--model-name", metavar="NAME", help="default: the first model that the server lists")
    group.add_argument("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY")


def check_remote_flags(arguments: argparse.Namespace, engine_args: Mapping[str, Any]) -> None:
    """Raises: UsageError: options of a server without a server, or of an engine with one."""
    if arguments.url is None:
        for name in ("model_name", "api_key"):
            if getattr(arguments, name) is not None:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} belongs to a server; give --url as well, or --model to run it here")
    elif engine_args:
        option = "--" + next(iter(engine_args)).replace("_", "-")
        hint = "; --model-name chooses one of its models" if option == "--model" else ""
        raise UsageError(f"{option} concerns an engine in this process, and --url asks a server{hint}")


class RemoteModel:
    """One model of a server.

    Args:
        url: of the API, such as ``http://localhost:8000/v1``.
        model: its name; None takes the first that the server lists.
        api_key: None takes that of the environment, if any.
        params: fields of `SamplingParams` that are sent with every request.

    Raises:
        UsageError: the server cannot be reached, or refuses.
    """

    def __init__(
        self, url: str, model: str | None = None, api_key: str | None = None, params: Mapping[str, Any] | None = None
    ) -> None:
        import httpx

        key = api_key or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT)
        self.url = url.rstrip("/")
        self._params = dict(params or {})
        self._client = httpx.Client(headers=headers, timeout=timeout)
        try:
            with self._errors():
                self.model, self.context = self._choose(model)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> RemoteModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def banner(self) -> str:
        """A line that says who answers."""
        context = "" if self.context is None else f", a context of {self.context} tokens"
        return f"{self.model} at {self.url}{context}."

    def chat(self, messages: list[dict[str, str]], chat_template_kwargs: Mapping[str, Any] | None = None) -> Pieces:
        """The answer to a conversation. Closing the iterator ends the request.

        Raises:
            TooLongError: the conversation does not fit the context.
            UsageError: anything else that the server refuses, or a connection that is lost.
        """
        body: dict[str, Any] = {"messages": messages}
        if chat_template_kwargs:
            body["chat_template_kwargs"] = dict(chat_template_kwargs)
        return self._stream("/chat/completions", body)

    def complete(self, prompt: str) -> Pieces:
        """The continuation of a text; as `chat`."""
        return self._stream("/completions", {"prompt": prompt})

    def _choose(self, model: str | None) -> tuple[str, int | None]:
        """The model's name and context."""
        answer = self._client.get(self.url + "/models")
        _check(answer)
        listed = answer.json()["data"]
        if model is None:
            model = str(listed[0]["id"])
        found: dict[str, Any] = next((entry for entry in listed if entry["id"] == model), {})
        if not found:
            raise UsageError(f"{self.url} has no model {model!r}, but {', '.join(entry['id'] for entry in listed)}")
        return model, found.get("max_model_len")

    def _stream(self, path: str, body: dict[str, Any]) -> Pieces:
        body = {"model": self.model, **body, **self._params, "stream": True, "stream_options": {"include_usage": True}}
        with self._errors(), self._client.stream("POST", self.url + path, json=body) as answer:
            if answer.status_code != 200:
                answer.read()
            _check(answer)
            for line in answer.iter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    yield _piece(json.loads(data))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever can go wrong between here and there, in one line."""
        import httpx

        try:
            yield
        except httpx.InvalidURL as error:
            raise UsageError(f"--url {self.url}: {error}") from None
        except httpx.ConnectError as error:
            raise UsageError(f"--url {self.url}: {error}; is the server running?") from None
        except httpx.HTTPError as error:
            raise UsageError(f"--url {self.url}: {error or type(error).__name__}") from None
        except (LookupError, TypeError, json.JSONDecodeError):
            raise UsageError(f"--url {self.url}: not an OpenAI-compatible API; does the path end in /v1?") from None


def _check(answer: httpx.Response) -> None:
    if answer.status_code != 200:
        _refuse(answer.text, f"HTTP {answer.status_code}: ")


def _refuse(text: str, prefix: str = "") -> None:
    """Raises: UsageError: always, with what the server says."""
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError):
        pass
    message = " ".join(str(text).split())[:500]
    kind = TooLongError if "maximum context length" in message else UsageError
    raise kind(prefix + message)


def _piece(event: dict[str, Any]) -> Piece:
    if "error" in event:
        _refuse(json.dumps(event))
    piece = Piece()
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        piece.text = choice.get("text") or delta.get("content") or ""
        piece.thought = delta.get("reasoning") or delta.get("reasoning_content") or ""
        piece.finish_reason = choice.get("finish_reason")
        piece.num_tokens = 1 if piece.text or piece.thought else 0
    usage = event.get("usage")
    if usage:
        piece.num_prompt_tokens = usage.get("prompt_tokens")
        piece.total_tokens = usage.get("completion_tokens")
        piece.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return piece
