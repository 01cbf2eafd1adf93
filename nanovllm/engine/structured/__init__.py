"""Structured output: from a user's constraint to the tokens that may come next.

    StructuredOutputsParams --GuideBuilder--> GuideSpec --GrammarCompiler--> Guide --Limiter--> Limits of a step

`llguidance` does the parsing; it is imported when the first constraint arrives. Nothing here knows tensors.
"""

from nanovllm.engine.structured.build import GuideBuilder
from nanovllm.engine.structured.compiler import GrammarCompiler
from nanovllm.engine.structured.grammar import to_grammar
from nanovllm.engine.structured.guide import Guide, GuideSpec
from nanovllm.engine.structured.limits import Limiter, Limits

__all__ = ["GrammarCompiler", "Guide", "GuideBuilder", "GuideSpec", "Limiter", "Limits", "to_grammar"]
