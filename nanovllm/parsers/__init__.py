"""Parsers of answers: reasoning and tool calls, found in the text while it is generated.

Text only: no tokens, no tensors, nothing of the server.
"""

from nanovllm.parsers.answer import Answer as Answer
from nanovllm.parsers.answer import AnswerParser as AnswerParser
from nanovllm.parsers.answer import ToolCall as ToolCall
from nanovllm.parsers.answer import collect as collect
from nanovllm.parsers.answer import make_answer_parser as make_answer_parser
from nanovllm.parsers.constraint import tool_constraint as tool_constraint
from nanovllm.parsers.events import Content as Content
from nanovllm.parsers.events import Event as Event
from nanovllm.parsers.events import Reasoning as Reasoning
from nanovllm.parsers.events import ToolCallArguments as ToolCallArguments
from nanovllm.parsers.events import ToolCallStart as ToolCallStart
from nanovllm.parsers.formats import TOOL_PARSERS as TOOL_PARSERS
from nanovllm.parsers.reasoning import REASONING_PARSERS as REASONING_PARSERS
