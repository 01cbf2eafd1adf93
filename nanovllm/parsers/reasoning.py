"""Where a model's reasoning ends and its answer begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.parsers.emitter import Emitter
from nanovllm.parsers.source import Source, Steps


@dataclass(frozen=True)
class ReasoningParser:
    """Reasoning between two markers, of which models leave out the first: templates put it into the prompt.

    Attributes:
        start: marker before the reasoning.
        end: marker after it.
        implicit_ends: texts that belong to the answer and end the reasoning too.
        switch: the chat template's variable that turns reasoning off, if it has one.
    """

    start: str
    end: str
    implicit_ends: tuple[str, ...] = ()
    switch: str | None = None

    def expected(
        self, prompt: str | None, chat_template_kwargs: Mapping[str, Any] | None, continue_final_message: bool
    ) -> bool:
        """Whether the answer begins with reasoning: not if it is switched off or the prompt has closed it."""
        if self.switch is not None and (chat_template_kwargs or {}).get(self.switch) is False:
            return False
        return prompt is None or not self.closed_by(prompt, continue_final_message)

    def closed_by(self, prompt: str, continue_final_message: bool = False) -> bool:
        """Whether the prompt ends with finished reasoning.

        An earlier message of the conversation may hold reasoning too, so the end marker must be the last thing in the
        prompt. A message that the model is to continue is beyond its reasoning unless that is open.
        """
        if continue_final_message:
            return prompt.rfind(self.end) >= prompt.rfind(self.start)
        return prompt.rstrip().endswith(self.end)

    def read(self, source: Source, emit: Emitter) -> Steps[None]:
        """Read the reasoning and its end marker. Without an end marker all of the text is reasoning."""
        begin = source.mark()
        yield from source.skip_space()
        if not (yield from source.accept(self.start)) and source.position > begin:
            emit.reasoning(source.since(begin))
        source.release()
        if (yield from source.copy_until((self.end, *self.implicit_ends), emit.reasoning)) == self.end:
            source.skip(len(self.end))


REASONING_PARSERS = {
    "qwen3": ReasoningParser("<think>", "</think>", ("<tool_call>",), "enable_thinking"),
    "deepseek_r1": ReasoningParser("<think>", "</think>"),
}
