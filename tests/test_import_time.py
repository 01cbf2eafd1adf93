"""What is fast must stay fast: importing the package and asking the command for help load no heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm

ROOT = Path(nanovllm.__file__).parents[1]
HEAVY = {"torch", "transformers", "numpy", "tokenizers", "huggingface_hub", "jinja2", "tqdm", "safetensors"}

RUN_COMMAND = """
import sys
from nanovllm.entrypoints.cli.main import main
sys.argv[1:] = {arguments!r}
assert main() == 0
"""


def modules_loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running ``code`` in a fresh interpreter."""
    listing = "\nimport sys, json; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + listing], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_no_heavy_library():
    assert modules_loaded_by("import nanovllm; nanovllm.__version__") & HEAVY == set()


def test_parameters_and_configuration_need_no_heavy_library():
    code = "from nanovllm import EngineArgs, SamplingParams; SamplingParams(temperature=0.5); EngineArgs()"
    assert modules_loaded_by(code) & HEAVY == set()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["--version"], ["generate", "--help"], ["collect-env", "--help"], ["doctor", "--help"]],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_the_command_answers_without_heavy_libraries(arguments: list[str]):
    assert modules_loaded_by(RUN_COMMAND.format(arguments=arguments)) & HEAVY == set()


def test_the_engine_is_loaded_without_transformers():
    loaded = modules_loaded_by("from nanovllm import LLM, AsyncLLM; import nanovllm.executor.in_process")
    assert "torch" in loaded and "transformers" not in loaded
