"""One request's life: its tokens, how far it has come, and the blocks it holds. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

from nanovllm.engine.block_pool import hash_block

if TYPE_CHECKING:
    from nanovllm.engine.fair_queue import Flow
    from nanovllm.engine.plan import TokenLogprobs
    from nanovllm.engine.structured import GuideSpec
    from nanovllm.sampling_params import SamplingParams


class RequestStatus(IntEnum):
    """Where a request stands.

    ::

        WAITING --admit--> RUNNING --stop / length / abort / error--> FINISHED
           ^                  |
           +----preempt-------+
    """

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Request:
    """A prompt on its way to one completion.

    Progress is three numbers. ``num_computed`` tokens have their K/V in the cache once every planned step has run;
    ``len(token_ids)`` tokens are known; ``num_pending`` more have been planned but their step has not reported yet.
    A step computes some of ``num_tokens - num_computed`` tokens: many for a prompt, one for a decode, many again
    after a preemption. There is no other phase.
    """

    __slots__ = (
        "bad_words_ids",
        "block_hashes",
        "blocks",
        "eos_token_ids",
        "finish_reason",
        "flow",
        "fork_of",
        "forks",
        "guide",
        "guided_from",
        "held",
        "key",
        "max_total",
        "min_total",
        "num_cached_tokens",
        "num_computed",
        "num_faults",
        "num_forks_waiting",
        "num_in_flight",
        "num_pending",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_reached",
        "num_registered",
        "num_stale",
        "params",
        "place",
        "pooling",
        "queued_ts",
        "request_id",
        "row",
        "salt",
        "seed",
        "status",
        "stop_token_ids",
        "tenant",
        "token_ids",
        "weight",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_model_len: int,
        stop_token_ids: frozenset[int] = frozenset(),
        eos_token_ids: frozenset[int] = frozenset(),
        bad_words_ids: tuple[tuple[int, ...], ...] = (),
        guide: GuideSpec | None = None,
        guided_from: int | None = None,
        pooling: str | None = None,
        seed: int = 0,
        cache_salt: str | None = None,
        fork_of: Request | None = None,
        held: bool = False,
        tenant: str = "",
        weight: float = 1.0,
    ) -> None:
        """
        Args:
            guide: what the output must follow.
            guided_from: position of its first token; None: the end of the prompt.
            pooling: "last" or "mean": the request wants one vector of its prompt, and generates nothing.
            seed: 64 bits that, with a token's position, determine every random draw.
            cache_salt: only requests of the same salt share cached prefixes.
            fork_of: a request whose tokens begin with all tokens of this one but the last; its blocks are shared.
            held: keep the blocks after finishing, for forks, until `Scheduler.release`.
            tenant: on whose behalf it runs; tenants share the engine in proportion to their weights.
        """
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.seed = seed
        self.salt = cache_salt.encode() if cache_salt else b""
        self.stop_token_ids = stop_token_ids
        self.eos_token_ids = eos_token_ids
        self.bad_words_ids = bad_words_ids
        self.guide = guide
        self.guided_from = self.num_prompt_tokens if guided_from is None else guided_from
        self.pooling = pooling
        limit = max_model_len if params.max_tokens is None else self.num_prompt_tokens + params.max_tokens
        self.max_total = min(limit, max_model_len)
        self.min_total = self.num_prompt_tokens + params.min_tokens

        self.status = RequestStatus.WAITING
        self.finish_reason: str | None = None
        self.key: tuple[int, int, int] = (0, 0, 0)  # (priority, arrival, index among forks): smaller goes first
        self.tenant = tenant
        self.weight = weight
        self.flow: Flow | None = None  # where it waits or runs
        self.place: tuple[int, float, int, int] | None = None  # among those that run; see `FairQueue`
        self.num_preemptions = 0  # times it was put back into the queue
        self.num_faults = 0  # steps with it that raised since it last got on; while there are any, it is a suspect
        self.num_reached = 0  # tokens that were computed before a step with it raised, at most
        self.queued_ts = 0.0  # seconds of the monotonic clock

        self.num_computed = 0
        self.num_pending = 0
        self.num_in_flight = 0  # plans under way that contain this request
        self.num_stale = 0  # of these, plans made before the last preemption: their K/V is gone
        self.row = -1

        self.blocks: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_registered = 0  # leading blocks offered to the prefix cache
        self.num_cached_tokens = 0
        self.num_prompt_logprobs = 0  # delivered so far

        self.fork_of = fork_of
        self.forks: dict[str, Request] = {}  # not queued before this request's prompt is computed
        self.num_forks_waiting = 0  # forks that will still share this request's blocks
        self.held = held

    @property
    def num_tokens(self) -> int:
        """Known tokens and those under way."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status == RequestStatus.FINISHED

    def hashes(self, count: int, block_size: int) -> list[bytes]:
        """Hash chain of the first ``count`` full blocks. Each block is hashed once in a request's life."""
        chain = self.block_hashes
        for index in range(len(chain), count):
            tokens = self.token_ids[index * block_size : (index + 1) * block_size]
            chain.append(hash_block(chain[-1] if chain else b"", tokens, b"" if chain else self.salt))
        return chain if len(chain) == count else chain[:count]

    def take_prompt_logprobs(self, start: int, computed: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Of log-probabilities computed from prompt position ``start`` on, those not delivered before a preemption."""
        new = computed[max(self.num_prompt_logprobs - start, 0) :]
        self.num_prompt_logprobs += len(new)
        return new

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.name}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed}, pending={self.num_pending}, "
            f"blocks={self.blocks})"
        )
