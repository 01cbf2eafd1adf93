"""A conversation that never outgrows the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from nanovllm.errors import ParameterError

Message = dict[str, str]
Prompt = TypeVar("Prompt")


class Conversation(Generic[Prompt]):
    """Messages, and the prompt they make.

    Args:
        render: makes a prompt of messages, and tells how many tokens it has; 0 if that is not known.
        context: tokens that prompt and answer share.
        answer_len: most tokens of an answer; None if there is no limit but the context.
        system_prompt: a system message that stays whatever else is forgotten.

    Attributes:
        turns: pairs of a question and its answer, oldest first. The last answer is None while it is being generated.
    """

    def __init__(
        self,
        render: Callable[[list[Message]], tuple[Prompt, int]],
        context: int,
        answer_len: int | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self.turns: list[tuple[str, str | None]] = []
        self._render = render
        self._context = context
        # An answer is left this much room before a turn is forgotten for it.
        self._reserve = min(context // 4, answer_len or context)
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def ask(self, question: str) -> tuple[Prompt, int]:
        """Add a question.

        Returns:
            The prompt that ends with it, and the number of turns that were forgotten to make room.

        Raises:
            ParameterError: the chat template refuses the messages, or the question alone fills the context. Nothing
                was added or forgotten.
        """
        turns: list[tuple[str, str | None]] = [*self.turns, (question, None)]
        prompt, length = self._render(self._messages(turns))
        limit = self._context - self._reserve
        if length > limit:
            # Forget more than is needed now: the turns that follow then find their prefix in the cache, instead of
            # moving the beginning of the prompt every time.
            while len(turns) > 1 and length > limit - self._context // 4:
                del turns[0]
                prompt, length = self._render(self._messages(turns))
        if length >= self._context:
            raise ParameterError(
                f"the message is too long: with it alone the prompt has {length} tokens, and "
                f"the context is {self._context}"
            )
        forgotten = len(self.turns) + 1 - len(turns)
        self.turns = turns
        return prompt, forgotten

    def shorten(self) -> tuple[Prompt, int]:
        """Forget the oldest quarter of the turns before the question asked last, because it did not fit.

        Returns:
            The prompt that is left, and the number of turns that were forgotten: 0 if there were none.
        """
        forgotten = (len(self.turns) - 1 + 3) // 4
        del self.turns[:forgotten]
        prompt, _ = self._render(self._messages(self.turns))
        return prompt, forgotten

    def answer(self, text: str) -> None:
        """Add the answer to the question asked last."""
        question, _ = self.turns.pop()
        self.turns.append((question, text))

    def take_back(self) -> str | None:
        """Remove the last turn and return its question; None if there is none."""
        return self.turns.pop()[0] if self.turns else None

    def clear(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def _messages(self, turns: list[tuple[str, str | None]]) -> list[Message]:
        messages = list(self._system)
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages
