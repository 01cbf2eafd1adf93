"""The engine running by itself: take commands, step, say what came of it; asleep when there is nothing to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from nanovllm.engine.core import EngineCore
from nanovllm.engine.family import make_family
from nanovllm.engine.messages import Add, Command, Finish, Inspect, Message, Update, View
from nanovllm.errors import StepError

logger = logging.getLogger(__name__)


class Inbox(Protocol):
    """Where commands come from."""

    def take(self, wait: bool) -> list[Command] | None:
        """The commands that have arrived; None: stop. Sleeps until there is one if ``wait``."""


class EngineLoop:
    """Drives a core until its inbox says stop.

    Args:
        core: what is driven; nobody else may touch it meanwhile.
        max_model_len: context in tokens.
        inbox: where commands come from.
        deliver: called with every `Update` and `View`; must not wait.
    """

    def __init__(self, core: EngineCore, max_model_len: int, inbox: Inbox, deliver: Callable[[Message], None]) -> None:
        self._core = core
        self._max_model_len = max_model_len
        self._inbox = inbox
        self._deliver = deliver

    def run(self) -> None:
        """Returns when the inbox says so; raises what is a fault of the engine itself."""
        core = self._core
        while True:
            commands = self._inbox.take(wait=not core.has_work)
            if commands is None:
                return
            update = Update()
            for command in commands:
                self._obey(command, update)
            if core.has_work:
                try:
                    update.outputs = core.step()
                except StepError as error:
                    logger.error("A request ends with an error, the others go on: %s", error)
            update.stats = core.meter.take()
            self._deliver(update)
            if core.watch is not None and (frame := core.watch.take(idle=not core.has_work)) is not None:
                self._deliver(View(frame))

    def _obey(self, command: Command, update: Update) -> None:
        core = self._core
        if isinstance(command, Add):
            try:
                family = make_family(
                    command.request_id,
                    command.input,
                    self._max_model_len,
                    command.seed,
                    command.tenant,
                    command.weight,
                )
                core.add(family[0], command.priority, family[1:])
            except Exception as error:
                update.refused.append((command.request_id, error))
        elif isinstance(command, Finish):
            core.finish(command.request_ids, command.reason)
        elif isinstance(command, Inspect):
            core.inspect(command.on)
        else:
            update.replies.append((command.number, core.reset_prefix_cache()))
