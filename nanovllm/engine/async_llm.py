"""The engine for asyncio: text is handled on the event loop, the core runs on a thread or in a process of its own.

event loop    generate --commands--> core          add, finish
              streams  <--messages--               EngineLoop: step, over and over; asleep when there is no work
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from nanovllm.config import EngineArgs, EngineConfig
from nanovllm.engine.caller import ANYONE, Caller
from nanovllm.engine.child_core import ChildCore
from nanovllm.engine.core import Executor
from nanovllm.engine.face import EngineFace, make_core
from nanovllm.engine.family import child_ids
from nanovllm.engine.input import EngineInput
from nanovllm.engine.inspection import LOST, Viewers
from nanovllm.engine.messages import Add, Command, Died, Finish, Inspect, Message, Ready, ResetPrefixCache, Update, View
from nanovllm.engine.spawn import EngineProcess, spawn
from nanovllm.engine.stats import LOG_INTERVAL, Observer, StatsLog
from nanovllm.engine.stream import Stream, Waker
from nanovllm.engine.thread_core import Listener, ThreadCore
from nanovllm.errors import EngineDeadError, EngineGenerateError, ParameterError, RequestTimeoutError
from nanovllm.outputs import PoolingRequestOutput, RequestOutput
from nanovllm.pooling_params import PoolingParams
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.inputs import PromptType

logger = logging.getLogger(__name__)

RESTART_WINDOW = 600.0  # seconds in which restarts are counted


class RunningCore(Protocol):
    """A core that runs by itself: `ThreadCore` or `ChildCore`."""

    error: BaseException | None

    @property
    def alive(self) -> bool: ...

    def listen(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> None: ...

    def send(self, command: Command) -> None: ...

    def stop(self) -> None: ...


class AsyncLLM(EngineFace):
    """Many streams at once over one engine.

    ``AsyncLLM(config)`` runs the core on a thread of this process, `launch` in a process of its own. All coroutines
    of one instance must run on the same event loop.

    Attributes:
        stats: the engine's latest known state and totals.
        viewers: those who watch its steps.
        num_blocks: blocks of the KV cache, the padding block included; 0 before the model is loaded.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor | None = None,
        *,
        process: EngineProcess | None = None,
        max_restarts: int = 0,
    ) -> None:
        """
        Args:
            executor: where the model runs; None makes the one the configuration asks for.
            process: what `spawn` has started with this configuration, instead of a thread.
            max_restarts: how often in ten minutes a process that has died is replaced.
        """
        self._core: RunningCore
        if process is None:
            config, core = make_core(config, executor)
            self._core = ThreadCore(core, config.model.max_model_len)
        else:
            self._core = ChildCore(process)
        super().__init__(config, core.executor if process is None else None)
        self.num_blocks = core.executor.num_blocks if process is None else 0
        self._ready = self._was_ready = process is None
        self._max_restarts = max_restarts
        self._deaths: deque[float] = deque()
        self._streams: dict[str, Stream] = {}
        self._waker = Waker()
        self.viewers = Viewers(lambda on: self._core.send(Inspect(on)))
        self._aborted: set[str] = set()  # streams whose prompt was still being tokenised
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers = itertools.count()
        self._replies: dict[int, asyncio.Future[bool]] = {}
        self._ready_waiters: list[asyncio.Future[None]] = []
        self._stopped = False
        self._log = StatsLog() if config.log_stats else None
        if self._log is not None:
            self.stats.observers.append(self._log)
        self._log_timer: asyncio.TimerHandle | None = None

    @classmethod
    def launch(cls, args: EngineArgs | EngineProcess, *, max_restarts: int = 0) -> AsyncLLM:
        """Start the engine in a process of its own; this one needs no torch.

        Returns while the model is being loaded there; `ready` waits for it, and so does `generate`.

        Args:
            args: or what `spawn` has started, before this module was imported.
            max_restarts: how often in ten minutes a process that has died is replaced by a new one.

        Raises:
            ParameterError, ModelError: the arguments cannot be honoured, or the tokenizer cannot be loaded.
        """
        process = args if isinstance(args, EngineProcess) else spawn(args.build())
        try:
            return cls(process.config, process=process, max_restarts=max_restarts)
        except BaseException:
            ChildCore(process).stop()
            raise

    # -- for users -----------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            ParameterError, ModelError: it cannot be.
            EngineDeadError: the engine has stopped.
        """
        self._listen()
        while not self._ready:
            if isinstance(self._core.error, ValueError) and not self._was_ready:
                raise self._core.error
            self._check_alive()
            waiter = asyncio.get_running_loop().create_future()
            self._ready_waiters.append(waiter)
            await waiter

    def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
        caller: Caller = ANYONE,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the outputs of a prompt. Leaving the iteration early aborts the request.

        Whoever reads slowly gets fewer outputs, with more in each; nothing is lost and nothing piles up.

        Args:
            caller: on whose behalf, and by when.

        Raises:
            ParameterError: the prompt or a parameter cannot be honoured.
            RequestTimeoutError: the caller's deadline has passed.
            EngineGenerateError: a step with this request failed; the engine goes on.
            EngineDeadError: the engine has stopped; unless it is `errored`, it is being restarted.
        """
        params = sampling_params if sampling_params is not None else self.input.default_params()
        return self._stream(partial(self.input.process, prompt, params), params, request_id, priority, caller)

    def encode(
        self,
        prompt: PromptType,
        pooling_params: PoolingParams | None,
        request_id: str,
        *,
        priority: int = 0,
        caller: Caller = ANYONE,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """The vector of a prompt, as a stream of one output. Raises what `generate` raises."""
        prepare = partial(self.input.process_pooling, prompt, pooling_params)
        return self._stream(prepare, None, request_id, priority, caller)

    async def _stream(
        self,
        prepare: Callable[[], EngineInput],
        params: SamplingParams | None,
        request_id: str,
        priority: int,
        caller: Caller,
    ) -> AsyncGenerator[Any, None]:
        """A request's life. ``prepare`` checks and tokenises it; ``params``: as the user gave them, if he did."""
        arrival = time.monotonic()
        self._check_alive()
        if request_id in self._streams:
            raise ParameterError("a request of this id is under way", "request_id", request_id)
        stream = self._streams[request_id] = Stream()
        reason = "abort"  # if it ends early
        last: RequestOutput | PoolingRequestOutput | None = None  # its last output
        timer: asyncio.TimerHandle | None = None
        begun = False
        try:
            await self._ready_by(caller.deadline)
            prepared = await asyncio.to_thread(prepare)
            self._check_alive()
            if caller.deadline is not None and time.monotonic() >= caller.deadline:
                raise self._time_is_up()
            caller.begins(len(prepared.prompt_token_ids))
            begun = True
            params = params or prepared.params
            ids = child_ids(request_id, prepared.params.n)
            self.output.add(request_id, prepared, params, ids, arrival)
            if request_id in self._aborted:
                await self.abort(request_id)
            else:
                self.stats.add(ids, arrival)
                command = Add(request_id, prepared, self._next_seed(), priority, caller.tenant, caller.weight)
                stream.command = command
                self._core.send(command)
            if caller.deadline is not None:
                seconds = caller.deadline - time.monotonic()
                timer = asyncio.get_running_loop().call_later(seconds, self._expire, request_id, ids)
            finished = False
            while not finished:
                if stream.end is not None:
                    output = stream.end
                elif self.output.is_due(request_id):
                    output = self.output.hand_out(request_id)
                else:
                    await stream.wait()
                    continue
                if isinstance(output, BaseException):
                    if not isinstance(output, RequestTimeoutError):
                        reason = "error"
                    raise output
                finished = output.finished
                if finished:
                    last = output
                    self.stats.finished(output, params)
                if isinstance(output, RequestOutput):
                    _raise_if_failed(output)
                    if prepared.pooling is not None:
                        return  # aborted: there is no vector
                yield output
        finally:
            if timer is not None:
                timer.cancel()
            final = self._abort(request_id, reason)
            if final is not None and params is not None:
                last = final
                self.stats.finished(final, params)
            self._streams.pop(request_id, None)
            self._aborted.discard(request_id)
            if begun:
                caller.ended(last.metrics.num_generation_tokens if last is not None and last.metrics is not None else 0)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their streams yield a final output with finish reason "abort". Unknown ids are passed over."""
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            final = self._abort(name)
            if name in self._streams:
                if final is None:
                    self._aborted.add(name)
                else:
                    self._streams[name].close(final)

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine has stopped, be it that it is being restarted."""
        self._check_alive()
        if not self._ready:
            raise EngineDeadError("the engine is not ready: its model is being loaded")

    async def get_tokenizer(self) -> Any:
        return self.tokenizer

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing changes, while requests hold blocks."""
        await self.ready()
        self._check_alive()
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        self._core.send(ResetPrefixCache(number))
        return await reply

    @property
    def observers(self) -> list[Observer]:
        """Whoever is told of every step and every request's end; append to follow the engine."""
        return self.stats.observers

    @property
    def is_running(self) -> bool:
        return self._core.alive and not self._stopped

    @property
    def errored(self) -> bool:
        """Whether the engine has stopped for good after a fault."""
        return self.dead_error is not None

    @property
    def dead_error(self) -> BaseException | None:
        """Why the engine has stopped for good."""
        return self._core.error

    def shutdown(self) -> None:
        """Stop the core and free weights and cache; streams under way end with EngineDeadError. Idempotent."""
        self._stopped = True
        self._core.stop()
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._end_all, EngineDeadError("the engine was shut down"))

    # -- on the event loop ---------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._stopped:
            raise EngineDeadError("the engine was shut down")
        if self._core.error is not None:
            raise EngineDeadError(f"the engine has stopped after a fault: {self._core.error}") from self._core.error

    async def _ready_by(self, deadline: float | None) -> None:
        """`ready`, unless the deadline passes before."""
        try:
            waiting = None if self._ready or deadline is None else deadline - time.monotonic()
            await (self.ready() if waiting is None else asyncio.wait_for(self.ready(), waiting))
        except asyncio.TimeoutError:
            raise self._time_is_up() from None

    def _time_is_up(self) -> RequestTimeoutError:
        self.stats.num_timeouts += 1
        return RequestTimeoutError("the request did not end in the time it had; it was aborted")

    def _expire(self, request_id: str, output_ids: list[str]) -> None:
        """A deadline has passed. The core lets go of the request at once, however slowly its outputs are read."""
        if self.output.is_running(request_id):
            self._core.send(Finish(output_ids, "abort"))
            self._streams[request_id].close(self._time_is_up())

    def _listen(self) -> None:
        """Have the core's messages delivered to the running loop."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._log_timer = None
            self._ready_waiters, self._replies = [], {}  # nobody waits on a loop that has ended
            self._core.listen(loop, self._receive)

    def _abort(self, request_id: str, reason: str = "abort") -> RequestOutput | None:
        """End a request that has not had its final output, which is returned."""
        final, children = self.output.abort(request_id, reason)
        if children:
            self.stats.forget(children)
            self._core.send(Finish(children, "abort"))
        return final

    def _receive(self, message: Message) -> None:
        if isinstance(message, Update):
            self._update(message)
        elif isinstance(message, View):
            self.viewers.show(message.frame)
        elif isinstance(message, Ready):
            model = dataclasses.replace(self.config.model, max_model_len=message.max_model_len)
            self.config = dataclasses.replace(self.config, model=model)
            self.input.max_model_len = message.max_model_len
            self.num_blocks = message.num_blocks
            self._ready = self._was_ready = True
            self._wake_ready()
            self.viewers.renew()
        else:
            self._bury(message)

    def _update(self, update: Update) -> None:
        """Make text of tokens, tell whoever waits, and the core which requests a stop string has ended."""
        for request_id, error in update.refused:
            if request_id in self._streams:
                self._streams[request_id].close(error)
        for number, result in update.replies:
            reply = self._replies.pop(number, None)
            if reply is not None and not reply.done():
                reply.set_result(result)
        due, stopped = self.output.take(update.outputs, update.stats)
        self._waker.wake(self._streams[request_id] for request_id in due if request_id in self._streams)
        if update.stats is not None:
            self.stats.step(update.outputs, update.stats)
            self._log_later()
        if stopped:
            self.stats.forget(stopped)
            self._core.send(Finish(stopped, "stop"))

    def _bury(self, death: Died) -> None:
        """The core has died: another one is started if that may help, and told of requests that have had nothing yet.

        Each is told of once more only, for it may be what the core has died of. The others end.
        """
        self._ready = False
        self.viewers.show(LOST)
        if self._was_ready or not isinstance(death.error, ValueError):  # what users can mend, `ready` tells them
            logger.error("The engine has died: %s", death.error)
            self.stats.fault("engine_died")
        error = EngineDeadError(f"the engine has stopped: {death.error}")
        self.stats.reset()
        if self._restart():
            self._end_all(error, but=self._retry())
        else:
            self._end_all(error)
            self._wake_ready()

    def _restart(self) -> bool:
        """Start another core in place of one that has died, if that may help."""
        now = time.monotonic()
        while self._deaths and now - self._deaths[0] > RESTART_WINDOW:
            self._deaths.popleft()
        may_restart = self._was_ready and len(self._deaths) < self._max_restarts
        if may_restart and isinstance(self._core, ChildCore) and self._loop is not None:
            self._deaths.append(now)
            logger.warning("Starting the engine again (%d of %d).", len(self._deaths), self._max_restarts)
            try:
                self._core = self._core.again()
                self._core.listen(self._loop, self._receive)
                return True
            except OSError:
                logger.exception("It cannot be started.")
        return False

    def _retry(self) -> set[str]:
        """Tell a new core of the requests that have had nothing yet, and not been told of before; their ids."""
        retried = set()
        for request_id, stream in self._streams.items():
            command, stream.command = stream.command, None
            if command is not None and self.output.is_untouched(request_id):
                self.stats.add(child_ids(request_id, command.input.params.n), self.output.arrival_ts(request_id))
                self.stats.num_retries += 1
                self._core.send(command)
                retried.add(request_id)
        return retried

    def _end_all(self, error: EngineDeadError, but: Collection[str] = ()) -> None:
        """End what the core was working on; requests that are still being prepared find out by themselves."""
        for request_id, stream in self._streams.items():
            if self.output.has(request_id) and request_id not in but:
                stream.close(error)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
        self._replies.clear()
        if self._stopped:
            self._wake_ready()

    def _wake_ready(self) -> None:
        waiters, self._ready_waiters = self._ready_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _log_later(self) -> None:
        """A line in ten seconds, as long as there is something to report."""
        if self._log is not None and self._log_timer is None and self._loop is not None:
            self._log_timer = self._loop.call_later(LOG_INTERVAL, self._write_log)

    def _write_log(self) -> None:
        self._log_timer = None
        if self._log is not None and self._log.report():
            self._log_later()


def _raise_if_failed(output: RequestOutput) -> None:
    """A completion that ended with an error ends its request with an exception."""
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise EngineGenerateError(f"request {output.request_id}: {completion.stop_reason}")
