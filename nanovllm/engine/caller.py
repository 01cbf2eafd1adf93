"""On whose behalf a request runs, as far as the engine has to know."""

from __future__ import annotations


class Caller:
    """Nobody in particular, with all the time there is. Subclasses are told what their requests use.

    Attributes:
        tenant: requests of different tenants share the engine fairly (`FairQueue`).
        weight: the tenant's share, relative to those of others.
        deadline: seconds of the monotonic clock; a request that has not ended by then is aborted. None: never.
    """

    tenant: str = ""
    weight: float = 1.0
    deadline: float | None = None

    def begins(self, num_prompt_tokens: int) -> None:
        """A request is about to be queued. What this raises, the request ends with."""

    def ended(self, num_generated_tokens: int) -> None:
        """A request that began has ended, in whatever way; tokens over all its outputs."""


ANYONE = Caller()
