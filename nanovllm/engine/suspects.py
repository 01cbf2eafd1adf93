"""Requests whose step raised: computed again in ever smaller groups, until each has given a token or stands alone.

    a step of 4 raises     [a b c d]                one of them, c, makes it raise
    its halves, in turn    [a b] passes, [c d] raises
    and theirs             [c] raises, [c] raises, ... c ends with an error; [d] passes

So a fault that was there once costs two steps more, and a request that makes every step raise ends alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.request import Request

RETRIES = 3  # of a request that fails alone, without having got any further


class Suspects:
    """Groups of requests, the first of which is on trial: it runs, and nobody else does.

    A request is a suspect as long as ``num_faults > 0``; it is in one group then.
    """

    def __init__(self) -> None:
        self._groups: deque[list[Request]] = deque()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __iter__(self) -> Iterator[Request]:
        for group in self._groups:
            yield from group

    @property
    def group(self) -> list[Request]:
        """Those on trial, in order of their keys."""
        return self._groups[0]

    def accuse(self, requests: list[Request], num_computed: dict[str, int]) -> bool:
        """A step of these requests, in order of their keys, has raised.

        A long prompt gives no token for many steps, and may meet several faults that are not its own: who has come
        further than at any fault before is accused as if for the first time.

        Args:
            num_computed: by id, the tokens of a request that were computed before the step.

        Returns:
            Whether it is found: a request that has failed alone more than `RETRIES` times in a row, and is to end.
        """
        for request in requests:
            if request.num_faults:
                self._remove(request)
            computed = num_computed[request.request_id]
            if computed > request.num_reached:
                request.num_reached, request.num_faults = computed, 0
            request.num_faults += 1
        half = len(requests) // 2
        for part in (requests[half:], requests[:half]):
            if part:
                self._groups.appendleft(part)
        return len(requests) == 1 and requests[0].num_faults > RETRIES

    def clear(self, request: Request) -> None:
        """A suspect has given a token, or has ended."""
        request.num_faults = 0
        self._remove(request)

    def _remove(self, request: Request) -> None:
        for group in self._groups:
            if request in group:
                group.remove(request)
                break
        self._groups = deque(group for group in self._groups if group)
