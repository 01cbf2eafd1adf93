"""The executor of one rank in the engine's own process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanovllm.engine.plan import StepPlan, StepResult
from nanovllm.errors import EngineDeadError
from nanovllm.runner.model_runner import ModelRunner, PendingStep, is_out_of_memory

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig


@dataclass(slots=True)
class FailedStep:
    """A step that raised; its handle passes that on."""

    error: Exception

    def result(self) -> StepResult:
        raise self.error


class InProcessExecutor:
    """Runs steps at ``submit``, in the caller's thread.

    On an accelerator that only launches them: the tokens stay on the device, ``result`` waits for them, and the next
    plan can be made and submitted meanwhile. On a CPU the step is done when ``submit`` returns; a thread of its own
    would only fight with planning for the interpreter and the cores.

    Attributes:
        num_blocks: blocks of the KV cache, the padding block included.
        kv_bytes_per_block, kv_cache_bytes: sizes in bytes, K and V of all layers.
        grammars: compiles grammars for the model's tokens.
    """

    def __init__(self, config: EngineConfig) -> None:
        runner = ModelRunner(config)
        self.num_blocks = runner.num_blocks
        self.kv_bytes_per_block = runner.kv_bytes_per_block
        self.kv_cache_bytes = runner.num_blocks * runner.kv_bytes_per_block
        self.grammars = runner.guidance.compiler
        self._runner: ModelRunner | None = runner

    def submit(self, plan: StepPlan) -> PendingStep | FailedStep:
        """Start a step; steps run in the order of submission.

        What a step raises comes out of its handle's ``result()``, and later steps can still be submitted. That memory
        did not suffice is a MemoryError, whoever finds it out.

        Raises:
            EngineDeadError: after ``shutdown``.
        """
        if self._runner is None:
            raise EngineDeadError("the executor has been shut down")
        try:
            return self._runner.launch(plan)
        except Exception as error:
            return FailedStep(MemoryError(str(error)) if is_out_of_memory(error) else error)

    def recover(self) -> None:
        """Make ready for the next step after one that raised. Raises what the device raises if it takes no more."""
        if self._runner is not None:
            self._runner.recover()

    def shutdown(self) -> None:
        """Free weights and cache. Idempotent."""
        self._runner = None
