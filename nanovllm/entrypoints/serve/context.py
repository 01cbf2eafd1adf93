"""What the handlers of one server share."""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request

from nanovllm import __version__
from nanovllm.entrypoints.serve.admission import Admission
from nanovllm.entrypoints.serve.args import ServeArgs
from nanovllm.entrypoints.serve.errors import ServeError
from nanovllm.entrypoints.serve.memory import Memory
from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FINGERPRINT = f"nanovllm-{__version__}"
MAX_WARNED = 200  # names of unknown fields that are remembered


@dataclass
class ServeContext:
    """On ``app.state.context``.

    Attributes:
        engine: the engine behind the server.
        args: the server's settings.
        admission: who is let in.
        memory: gives back what large requests and floods leave behind.
        model_names: names the model answers to; the first is the one answers carry.
        created: seconds since the epoch when the server was made.
        load: requests of the generating endpoints under way.
        draining: the server is ending and takes no new requests.
    """

    engine: AsyncLLM
    args: ServeArgs
    model_names: list[str] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))
    load: int = 0
    draining: bool = False
    admission: Admission = field(init=False)
    memory: Memory = field(default_factory=Memory)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.admission = Admission(self.engine, self.args)
        if not self.model_names:
            self.model_names = self.args.served_model_name or [self.engine.model_config.model]
        if not self.args.reasoning_parser:
            self.args.reasoning_parser = self.engine.config.structured_outputs.reasoning_parser

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ServeError: it was not loaded.
        """
        tokenizer = self.engine.input.tokenizer
        if tokenizer is None:
            raise ServeError(400, "this needs a tokenizer, and the server runs with skip_tokenizer_init")
        return tokenizer

    def token_id(self, text: str) -> int | None:
        """The id of the token that ``text`` is; None if it is not one."""
        return self.tokenizer.convert_tokens_to_ids([text])[0]

    @property
    def max_model_len(self) -> int:
        """The context in tokens."""
        return self.engine.input.max_model_len

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """Sampling parameters of requests that do not set them: generation_config.json's, and the server's own."""
        return {**self.engine.model_config.generation_defaults, "stream_interval": self.args.stream_interval}

    def model_name(self, asked: str | None) -> str:
        """The name an answer carries; none asked for is the first.

        Raises:
            ServeError: the model goes by other names.
        """
        if not asked:
            return self.model_names[0]
        if asked not in self.model_names:
            aliases = ", ".join(self.model_names)
            raise ServeError(404, f"The model `{asked}` does not exist. Valid aliases: {aliases}.", "model")
        return asked

    def engine_id(self, call_id: str) -> str:
        """An id for the engine, which is unique although clients may name their requests."""
        return f"{call_id}-{next(self._numbers)}"

    def names_tokens_by_id(self, asked: bool | None) -> bool:
        """Whether log-probabilities name tokens ``token_id:7``: as the request asks, or else the server."""
        return self.args.return_tokens_as_token_ids if asked is None else asked

    def check_priority(self, priority: int) -> None:
        """Raises ParameterError if requests are served in another order."""
        if priority and self.engine.config.scheduler.policy != "priority":
            raise ParameterError("has no effect unless the server runs with --scheduling-policy priority", "priority",
                                 priority)  # fmt: skip

    def warn_unknown(self, fields: dict[str, Any] | None) -> None:
        """Log names of fields that no endpoint knows, each once."""
        for name in fields or ():
            if name not in self._warned and len(self._warned) < MAX_WARNED:
                self._warned.add(name)
                logger.warning("Requests hold a field that is unknown and has no effect: %s", repr(name)[:80])

    def log_request(self, request_id: str, prompt: Any, params: Any, labels: dict[str, Any]) -> None:
        """With ``enable_log_requests``: what came, its text cut to ``max_log_len`` characters or tokens."""
        if self.args.enable_log_requests:
            limit = self.args.max_log_len
            shown = prompt if limit is None else prompt[:limit]
            told = {key: value for key, value in labels.items() if value is not None}
            logger.info("Received request %s: prompt: %r, params: %s, %s", request_id, shown, params, told)


def get_context(request: Request) -> ServeContext:
    """The context of the server that got ``request``."""
    context: ServeContext = request.app.state.context
    return context


def make_request_id(prefix: str, request: Request, asked: str | None = None) -> str:
    """``prefix`` and the id that the client gave in the body or in ``X-Request-Id``, or a random one."""
    return f"{prefix}-{asked or request.headers.get('x-request-id') or uuid.uuid4().hex[:16]}"
