"""The engine for asyncio: the core runs on a thread of its own, text is handled on the event loop.

event loop    generate --commands--> core thread    add, finish
              streams  <--outputs---               core.step, over and over; asleep when there is no work
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from nanovllm.config import EngineConfig
from nanovllm.engine.core import Executor
from nanovllm.engine.face import EngineFace
from nanovllm.engine.plan import EngineOutput
from nanovllm.errors import EngineDeadError, EngineGenerateError, ParameterError, StepError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.inputs import PromptType

logger = logging.getLogger(__name__)

Command = Callable[[], object]
Stream = asyncio.Queue[RequestOutput | BaseException]


class AsyncLLM(EngineFace):
    """Many streams at once over one engine, which runs on a thread of its own.

    All coroutines of one instance must run on the same event loop.
    """

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        super().__init__(config, executor)
        self.dead_error: BaseException | None = None
        self._streams: dict[str, Stream] = {}
        self._aborted: set[str] = set()  # streams whose prompt was still being tokenised
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: list[Command] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="nanovllm-core", daemon=True)
        self._thread.start()

    # -- for the event loop --------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the outputs of a prompt. Leaving the iteration early aborts the request.

        Raises:
            ParameterError: the prompt or a parameter cannot be honoured.
            EngineGenerateError: a step with this request failed; the engine goes on.
            EngineDeadError: the engine has stopped for good.
        """
        self._check_alive()
        self._loop = asyncio.get_running_loop()
        if request_id in self._streams:
            raise ParameterError("a request of this id is under way", "request_id", request_id)
        stream: Stream = asyncio.Queue()
        self._streams[request_id] = stream
        try:
            params = sampling_params if sampling_params is not None else self.input.default_params()
            prepared, family = await asyncio.to_thread(self._prepare, request_id, prompt, params)
            self.output.add(request_id, prepared, params, [member.request_id for member in family])

            def add() -> None:
                try:
                    self.core.add(family[0], priority, family[1:])
                except Exception as error:
                    self._post(partial(stream.put_nowait, error))

            if request_id in self._aborted:
                await self.abort(request_id)
            else:
                self._command(add)
            finished = False
            while not finished:
                output = await stream.get()
                if isinstance(output, BaseException):
                    raise output
                failed = next((c for c in output.outputs if c.finish_reason == "error"), None)
                if failed is not None:
                    raise EngineGenerateError(f"request {request_id}: {failed.stop_reason}")
                finished = output.finished
                yield output
        finally:
            await self.abort(request_id)
            self._streams.pop(request_id, None)
            self._aborted.discard(request_id)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their streams yield a final output with finish reason "abort". Unknown ids are passed over."""
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            final, children = self.output.abort(name)
            if children:
                self._command(partial(self.core.finish, children, "abort"))
            if name in self._streams:
                if final is None:
                    self._aborted.add(name)
                else:
                    self._streams[name].put_nowait(final)

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine has stopped."""
        self._check_alive()

    async def get_tokenizer(self) -> Any:
        return self.tokenizer

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing changes, while requests hold blocks."""
        self._check_alive()
        done = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()

        def reset() -> None:
            result = self.core.reset_prefix_cache()
            self._post(lambda: done.set_result(result))

        self._command(reset)
        return await done

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def errored(self) -> bool:
        return self.dead_error is not None

    def shutdown(self) -> None:
        """Stop the core and free weights and cache; streams under way end with EngineDeadError. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._end_streams(EngineDeadError("the engine was shut down"))
        self.core.shutdown()

    def _check_alive(self) -> None:
        if self.dead_error is not None:
            raise EngineDeadError("the engine has stopped after a fault; make a new one") from self.dead_error
        if not self.is_running:
            raise EngineDeadError("the engine was shut down")

    def _command(self, command: Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        """On the event loop: make text of tokens, and tell the core which requests a stop string has ended."""
        request_outputs, stopped = self.output.process(outputs)
        if stopped:
            self._command(partial(self.core.finish, stopped, "stop"))
        for output in request_outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)

    def _end_streams(self, error: BaseException) -> None:
        for stream in list(self._streams.values()):
            self._post(partial(stream.put_nowait, error))

    # -- for the core thread -------------------------------------------------------------------------------------

    def _post(self, callback: Callable[[], object]) -> None:
        """Run a callback on the event loop, if there still is one."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._commands or self._stopping or self.core.has_work):
                        self._wake.wait()
                    if self._stopping:
                        return
                    commands, self._commands = self._commands, []
                for command in commands:
                    command()
                try:
                    outputs = self.core.step()
                except StepError:
                    logger.exception("A step failed; its requests end with an error, the others go on.")
                    continue
                if outputs:
                    self._post(partial(self._deliver, outputs))
        except BaseException as error:
            logger.exception("The engine has stopped.")
            self.dead_error = error
            self._end_streams(EngineDeadError(f"the engine has stopped: {error!r}"))
