"""What users read of a result."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from nanovllm.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, Logprob, RequestOutput


def output() -> RequestOutput:
    completions = [
        CompletionOutput(0, " world", [5, 6], finish_reason="stop"),
        CompletionOutput(1, " there", [7], logprobs=[{7: Logprob(-0.5, 1, " there")}]),
    ]
    return RequestOutput("0", "hello", [1, 2], outputs=completions, finished=True)


def test_the_first_completion_can_be_read_directly():
    result = output()
    assert result.text == result["text"] == result.outputs[0].text == " world"
    assert result.token_ids == result["token_ids"] == [5, 6]
    with pytest.raises(KeyError, match="attribute"):
        result["prompt"]


def test_finished_is_told_per_completion():
    first, second = output().outputs
    assert first.finished() and not second.finished()


def test_repr_shows_prompt_and_text():
    assert "prompt='hello'" in repr(output()) and "text=' world'" in repr(output())
    assert "prompt=3 token ids" in repr(RequestOutput("0", None, [1, 2, 3]))


def test_outputs_survive_pickling():
    assert pickle.loads(pickle.dumps(output())) == output()


def test_beam_search_output_holds_sequences():
    sequence = BeamSearchSequence(tokens=[1, 2], logprobs=[{2: Logprob(-1.0)}], cum_logprob=-1.0)
    assert BeamSearchOutput([sequence]).sequences[0].tokens == [1, 2]


def test_the_text_side_imports_neither_torch_nor_transformers():
    code = (
        "import sys, nanovllm.sampling_params, nanovllm.outputs, nanovllm.inputs, nanovllm.engine.input, "
        "nanovllm.engine.output; assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
