"""Renders conversations with the demo model's chat template, the way engines and transformers do."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_FILE = Path(__file__).parent / "chat_template.jinja"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
# What the template ends a prompt with when no thinking is wanted.
NO_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@cache
def _template() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE_FILE.read_text(encoding="utf-8"))


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, think: bool | None = None) -> str:
    """The prompt for the next answer of the assistant."""
    extra = {} if think is None else {"enable_thinking": think}
    return _template().render(messages=messages, tools=tools, add_generation_prompt=True, **extra)
