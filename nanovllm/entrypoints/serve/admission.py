"""Who is let in. Whoever is refused costs little: most are before their body is read, all before a prompt is queued.

Admit    Admission.admit  the head has come: a `Ticket` with tenant and deadline     or 429, 503
handler  Ticket.expect    the body has come: a place for each output                 or 503
engine   Ticket.begins    a prompt was tokenised and is to be queued                 or 503
         Ticket.ended     its outputs have ended
Admit    Ticket.release   the last byte is out: quotas and places come back
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nanovllm.engine.caller import Caller
from nanovllm.entrypoints.serve.accounts import Account, whole_seconds
from nanovllm.entrypoints.serve.errors import ServeError
from nanovllm.entrypoints.serve.quota import Pace
from nanovllm.entrypoints.serve.tenants import DEFAULT, Tenant, read_tenants
from nanovllm.errors import ParameterError

if TYPE_CHECKING:
    from fastapi import Request

    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.entrypoints.serve.args import ServeArgs

logger = logging.getLogger(__name__)

TIMEOUT_HEADER = b"x-request-timeout"
# Who is let in to run the model; nothing else has a ticket.
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses"})


class Admission:
    """The server's limits and its tenants' quotas.

    Attributes:
        num_places: outputs under way, waiting or running; as many as requests if each has one output.
        accounts: by tenant; empty without a file of tenants.
        rejected: requests refused because the server was full, by the limit that was met.
    """

    def __init__(self, engine: AsyncLLM, args: ServeArgs) -> None:
        """
        Raises:
            ParameterError: the file of tenants cannot be honoured.
        """
        self._engine = engine
        self._args = args
        self._pace = Pace()
        self.num_places = 0
        self.accounts: dict[str, Account] = {}
        self.rejected = {"requests": 0, "tokens": 0}
        self.owners: list[tuple[bytes, str]] = []  # digest of a key, whose it is
        self._settle(self._read())

    # -- tenants -------------------------------------------------------------------------------------------------

    @property
    def has_tenants(self) -> bool:
        return self._args.tenants is not None

    def reload(self) -> None:
        """Read the file of tenants again. If it cannot be honoured, that is logged, and all stays as it was."""
        try:
            self._settle(self._read())
        except ParameterError as error:
            logger.error("The tenants stay as they were: %s", error)
        else:
            logger.info("Tenants: %s.", ", ".join(self.accounts))

    def _read(self) -> dict[str, Tenant]:
        file = self._args.tenants
        if file is None:
            return {}
        tenants = read_tenants(file, tuple(self._args.api_key))
        levels = [tenant for tenant in tenants.values() if tenant.priority]
        if levels and self._engine.config.scheduler.policy != "priority":
            raise ParameterError(f"{levels[0].name}.priority is {levels[0].priority}: start the server with "
                                 "--scheduling-policy priority, or leave it out", "tenants", file)  # fmt: skip
        return tenants

    def _settle(self, tenants: dict[str, Tenant]) -> None:
        now = time.monotonic()
        for name, tenant in tenants.items():
            if name in self.accounts:
                self.accounts[name].change(tenant, now)
            else:
                self.accounts[name] = Account(tenant, now)
        for name in self.accounts.keys() - tenants.keys():  # requests under way keep theirs to the end
            del self.accounts[name]
        keys = [(key, DEFAULT) for key in self._args.api_key]
        keys += [(key, tenant.name) for tenant in tenants.values() for key in tenant.api_keys]
        self.owners = [(digest(key), name) for key, name in keys]

    # -- requests ------------------------------------------------------------------------------------------------

    def admit(self, tenant: str, headers: Iterable[tuple[bytes, bytes]]) -> Ticket:
        """Let a request in.

        Args:
            tenant: whose key it has brought.
            headers: its own.

        Raises:
            ServeError: 429, its tenant has no quota left; 503, the server is full.
            ParameterError: a header that cannot be honoured.
        """
        now = time.monotonic()
        deadline = self._deadline(headers, now)
        account = self.accounts.get(tenant)
        if account is not None:
            account.check(now)
        ticket = Ticket(self, account, deadline)
        self._check_places(ticket, 1, now)
        self._check_tokens(ticket, now)
        if account is not None:
            account.open(now)
        return ticket

    def _deadline(self, headers: Iterable[tuple[bytes, bytes]], now: float) -> float | None:
        """The server's time-out or the request's own, whichever is shorter; 0.0 is none."""
        seconds = self._args.request_timeout or math.inf
        given = next((value.decode("latin-1") for name, value in headers if name == TIMEOUT_HEADER), None)
        if given is not None:
            try:
                asked = float(given)
            except ValueError:
                asked = math.nan
            if not 0 < asked < math.inf:
                raise ParameterError("must be a number of seconds above 0", "X-Request-Timeout", given[:40])
            seconds = min(seconds, asked)
        return None if seconds == math.inf else now + seconds

    def _check_places(self, ticket: Ticket, count: int, now: float) -> None:
        """Whether there is room for so many more outputs. A request larger than the limit is let in if it is alone."""
        limit = self._args.max_num_queued_reqs
        if limit and self.num_places and self.num_places + count > limit:
            message = f"{self.num_places} requests are under way, of at most {limit} (--max-num-queued-reqs)"
            raise self._full("requests", message, ticket, now)

    def _check_tokens(self, ticket: Ticket, now: float) -> None:
        """Whether prompts may be queued. Those of the same request do not keep each other out."""
        limit = self._args.max_num_queued_tokens
        waiting = self._engine.output.num_prefill_tokens - ticket.num_prompt_tokens
        if limit and waiting >= limit:
            message = (
                f"{waiting} tokens of prompts have to be computed first, of at most {limit} (--max-num-queued-tokens)"
            )
            raise self._full("tokens", message, ticket, now)

    def _full(self, limit: str, message: str, ticket: Ticket, now: float) -> ServeError:
        """The server is full. It is worth trying again when half of what is under way has ended."""
        self.rejected[limit] += 1
        if ticket.account is not None:
            ticket.account.rejected["queue"] += 1
        seconds = whole_seconds(self._pace.wait(self.num_places / 2, now))
        return ServeError(503, f"The server is full: {message}. Please try again in {seconds} s.",
                          headers={"Retry-After": str(seconds)})  # fmt: skip

    def _leave(self, ticket: Ticket) -> None:
        now = time.monotonic()
        self.num_places -= ticket.num_places
        for _ in range(ticket.num_places):
            self._pace.ended(now)
        if ticket.account is not None:
            ticket.account.close(now)


class Ticket(Caller):
    """A request that was let in, until its answer has ended.

    Attributes:
        account: its tenant's; None without a file of tenants.
        num_places: outputs it is counted as.
        num_prompt_tokens: of its prompts that were queued.
    """

    def __init__(self, admission: Admission, account: Account | None, deadline: float | None) -> None:
        self._admission = admission
        self._holders = 1
        self.account = account
        self.deadline = deadline
        self.num_places = self.num_prompt_tokens = 0
        if account is not None:
            self.tenant, self.weight = account.tenant.name, account.tenant.weight

    def priority(self, asked: int) -> int:
        """The engine's priority: the request's own counts from its tenant's, and may only be later.

        Raises:
            ParameterError: it would be earlier.
        """
        if self.account is None:
            return asked
        if asked < 0:
            raise ParameterError("counts from your tenant's priority: use 0 or more", "priority", asked)
        return self.account.tenant.priority + asked

    def expect(self, num_outputs: int) -> None:
        """So many outputs are wanted; they have their places until the answer has ended.

        Raises:
            ServeError: 503, there is no room for them.
        """
        self._admission._check_places(self, num_outputs, time.monotonic())
        self.num_places += num_outputs
        self._admission.num_places += num_outputs

    def begins(self, num_prompt_tokens: int) -> None:
        """A prompt is about to be queued."""
        now = time.monotonic()
        self._admission._check_tokens(self, now)
        self.num_prompt_tokens += num_prompt_tokens
        if self.account is not None:
            self.account.use(num_prompt_tokens, 0, now)

    def ended(self, num_generated_tokens: int) -> None:
        """Its outputs have ended."""
        if self.account is not None:
            self.account.use(0, num_generated_tokens, time.monotonic())

    def headers(self) -> Iterator[tuple[bytes, bytes]]:
        """For the answer: what is left of the quotas."""
        if self.account is not None:
            for name, value in self.account.headers(time.monotonic()).items():
                yield name.encode(), value.encode()

    def hold(self) -> None:
        """Go on after the answer; `release` must follow."""
        self._holders += 1

    def release(self) -> None:
        """The answer has ended."""
        self._holders -= 1
        if self._holders == 0:
            self._admission._leave(self)


def get_ticket(request: Request) -> Ticket:
    """What a request of `GENERATING` was let in with."""
    ticket: Ticket = request.state.ticket
    return ticket


def digest(key: str | bytes) -> bytes:
    """What is kept and compared of a key."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
