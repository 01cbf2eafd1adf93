"""What an engine that runs by itself is told, and what it says.

    face --commands-->  Add, Finish, ResetPrefixCache, Inspect        engine loop
         <--messages--  Ready, Update, View, Died

All of it is plain data: the loop may run on a thread of this process or in a process of its own (`wire.py` has the
bytes).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanovllm.engine.input import EngineInput
from nanovllm.engine.plan import EngineOutput

if TYPE_CHECKING:
    from nanovllm.engine.stats import StepStats


@dataclass(slots=True)
class Add:
    """Answer a prompt. Refused, it comes back in ``Update.refused``."""

    request_id: str
    input: EngineInput
    seed: int  # 64 bits, used if the parameters name none
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0


@dataclass(slots=True)
class Finish:
    """End requests early; ids are those of `child_ids`."""

    request_ids: list[str]
    reason: str


@dataclass(slots=True)
class ResetPrefixCache:
    """Forget cached prefixes; ``Update.replies`` says under this number whether it was done."""

    number: int


@dataclass(slots=True)
class Inspect:
    """Send a `View` now and then, the first with the whole state; or send no more of them."""

    on: bool


Command = Add | Finish | ResetPrefixCache | Inspect


@dataclass(slots=True)
class Ready:
    """The model is loaded; the first message of a process."""

    max_model_len: int  # tokens; shortened, perhaps, to what the cache holds
    num_blocks: int  # of the KV cache, the padding block included


@dataclass(slots=True)
class Update:
    """What a step yielded, and answers to commands."""

    outputs: list[EngineOutput] = field(default_factory=list)
    stats: StepStats | None = None
    refused: list[tuple[str, Exception]] = field(default_factory=list)  # request id, why
    replies: list[tuple[int, bool]] = field(default_factory=list)  # number of the command, its result


@dataclass(slots=True)
class View:
    """What whoever watches is shown (`inspection.py`)."""

    frame: bytes


@dataclass(slots=True)
class Died:
    """The engine has stopped; the last message there is."""

    error: BaseException


Message = Ready | Update | View | Died
