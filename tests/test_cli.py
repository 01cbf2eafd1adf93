"""The ``nanovllm`` command, run as a user runs it: in a process of its own, through pipes, files and a terminal."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_checkpoint
from tiny_tokenizers import qwen

import nanovllm
from nanovllm.engine.tokenizer import Tokenizer

ROOT = Path(nanovllm.__file__).parents[1]
VOCAB_SIZE, IM_END = 337, 332  # of tiny_tokenizers.qwen
COMMAND = [sys.executable, "-m", "nanovllm"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*arguments: str | Path, stdin: str | bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command, variables = [*COMMAND, *map(str, arguments)], {**ENVIRONMENT, **environment}
    done = subprocess.run(command, input=data, capture_output=True, env=variables, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def start(*arguments: str | Path, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        bufsize=0,
    )


def json_lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]


def assert_is_one_line_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("nanovllm: error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "qwen3", vocab_size=VOCAB_SIZE, eos_token_id=IM_END, max_position_embeddings=8192)
    return qwen(folder)


@pytest.fixture
def generate(model: Path) -> list[str]:
    """A command whose output is as long as it may be, and always the same."""
    return ["generate", "--model", str(model), "--temperature", "0", "--ignore-eos", "--kv-cache-memory-bytes", "64M"]


# -- the program itself


def test_without_a_command_help_is_shown():
    done = run()
    assert done.returncode == 0 and done.stdout.startswith("usage: nanovllm")
    assert done.stdout == run("--help").stdout
    assert "generate" in done.stdout and "collect-env" in done.stdout


@pytest.mark.parametrize("option", ["--version", "-v"])
def test_version(option: str):
    assert run(option).stdout == f"{nanovllm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["genrate", "x"], "'genrate'; did you mean generate?"),
        (["--no-such-option"], "there is no option --no-such-option"),
        (["generate", "x", "--max_tokns", "3"], "--max-tokns; did you mean --max-tokens?"),
        (["generate", "x", "--max-tokens", "many"], "'many' is not a whole number"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["generate", "x", "--temperature", "3"], "temperature must be in [0, 2]"),
        (["generate", "x", "--temp", "0"], "there is no option --temp"),
        (["generate", "What", "is", "this?"], "'is' is one argument too many; quote"),
        (["generate", "x", "--file", "y"], "not both"),
        (["generate", "--file", "no/such/file"], "no/such/file: No such file"),
        (["generate", "x", "--raw", "--system-prompt", "y"], "system_prompt"),
        (["generate", "x", "--hf-overrides", "[1]"], "not a JSON object"),
        (["generate", "x", "--dtype", "int3"], "dtype must be one of"),
        (["generate", "x", "--max-model-len", "lots"], "max_model_len must be"),
        (["generate", "x", "--model", "./no-such-folder"], "'./no-such-folder': no such folder"),
        (["generate"], "standard input is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_answered_in_one_line(arguments: list[str], part: str):
    assert_is_one_line_error(run(*arguments), part)


def test_input_that_is_not_utf8_is_refused(tmp_path: Path):
    assert_is_one_line_error(run("generate", stdin=b"caf\xe9"), "standard input is not UTF-8", "0xe9 at position 3")
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9\n")
    assert_is_one_line_error(run("generate", "--file", file), "latin1.txt is not UTF-8")
    done = subprocess.run([*COMMAND, "generate", b"caf\xe9"], capture_output=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2 and b"the prompt is not UTF-8" in done.stderr and done.stderr.count(b"\n") == 1


def test_closed_standard_input_is_no_prompt():
    command = f"exec {shlex.join(COMMAND)} generate"
    for arguments in ("", " -"):
        shell = ["sh", "-c", f"{command}{arguments} <&-"]
        done = subprocess.run(shell, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert_is_one_line_error(done, "prompt" if not arguments else "standard input is closed")


def test_an_unusable_model_is_answered_in_one_line(model: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert_is_one_line_error(run("generate", "x", "--model", tmp_path / "empty"), "has no config.json")

    unknown = tmp_path / "unknown"
    unknown.mkdir()
    config = json.loads((model / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))
    assert_is_one_line_error(run("generate", "x", "--model", unknown), "NoSuchForCausalLM", "Qwen3ForCausalLM")

    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in model.iterdir():
        data = file.read_bytes()
        (truncated / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    assert_is_one_line_error(run("generate", "x", "--model", truncated), "model.safetensors")


# -- generate


def test_text_streams_to_a_terminal_and_is_what_the_batch_gives(generate: list[str]):
    expected = json_lines(run(*generate, "hello 世界", "--max-tokens", "100", "--json"))[0]
    assert len(expected["token_ids"]) == 100 and not expected["text"].isascii()

    terminal, end = pty.openpty()
    process = start(*generate, "hello 世界", "--max-tokens", "100", stdout=end)
    os.close(end)
    chunks = []
    try:
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)
    except OSError:  # how Linux reports that the other end was closed
        pass
    assert process.wait() == 0
    assert process.stderr is not None and process.stderr.read() == b""  # quiet
    text = "".join(chunk.decode() for chunk in chunks)  # every piece by itself is whole characters
    assert text.replace("\r\n", "\n") == expected["text"] + "\n"
    assert len(chunks) > 3


def test_the_model_in_the_box_answers_and_ends():
    output = json_lines(run("generate", "Hello!", "--json", "--temperature", "0"))[0]
    assert output["finish_reason"] == "stop" and output["stop_reason"] is None  # EOS
    assert output["text"].strip()


def test_a_file_runs_as_a_batch_in_its_order(generate: list[str], tmp_path: Path):
    prompts = ["the dog", "naïve\u2028café", "你好", "def main():"]
    file = tmp_path / "prompts.txt"
    file.write_text("\r\n".join(["", *prompts, "  ", ""]), encoding="utf-8")
    outputs = json_lines(run(*generate, "--file", file, "--max-tokens", "12", "--json"))
    assert [output["prompt"] for output in outputs] == prompts
    assert all(output["finish_reason"] == "length" and len(output["token_ids"]) == 12 for output in outputs)
    assert len({output["text"] for output in outputs}) == len(prompts)

    piped = run(*generate, "--file", "-", "--max-tokens", "12", stdin="\n".join(prompts))
    blocks = [f">>> {output['prompt']}\n{output['text']}\n\n" for output in outputs]
    assert piped.stdout == "".join(blocks) and piped.stderr == ""


def test_standard_input_is_one_prompt(generate: list[str]):
    text = "first line\n\n  second line\n"
    outputs = json_lines(run(*generate, "--json", "--max-tokens", "2", stdin=text))
    assert [output["prompt"] for output in outputs] == ["first line\n\n  second line"]
    assert json_lines(run(*generate, "-", "--json", "--max-tokens", "2", stdin=text)) == outputs


def test_the_chat_template_is_applied_unless_raw(generate: list[str], model: Path):
    tokenizer = Tokenizer.load(model)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "-hello"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
    chat = [*generate, "--json", "--max-tokens", "1", "--system_prompt=be brief"]
    output = json_lines(run(*chat, "--chat-template-kwargs", '{"enable_thinking": false}', "--", "-hello"))[0]
    assert output["num_prompt_tokens"] == len(rendered)
    output = json_lines(run(*generate, "--json", "--raw", "--max-tokens", "1", "--", "-hello"))[0]
    assert output["num_prompt_tokens"] == len(tokenizer.encode("-hello"))


def test_several_outputs_and_their_log_probabilities(model: Path):
    options = ["--n", "3", "--seed", "5", "--max-tokens", "4", "--ignore-eos", "--logprobs", "2", "--stop", "\ue000"]
    outputs = json_lines(run("generate", "x", "--model", model, "--json", *options))
    assert [output["index"] for output in outputs] == [0, 1, 2]
    assert len({tuple(output["token_ids"]) for output in outputs}) == 3  # as `--seed` is one for each of them
    for output in outputs:
        own = [position[0]["logprob"] for position in output["logprobs"]]
        assert [position[0]["token_id"] for position in output["logprobs"]] == output["token_ids"]
        assert output["cumulative_logprob"] == pytest.approx(sum(own))
    plain = run("generate", "x", "--model", model, *options)
    assert plain.stdout == "".join(f">>> x [{o['index'] + 1}]\n{o['text']}\n\n" for o in outputs)


def test_sampling_defaults_are_the_models(model: Path, tmp_path: Path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "temperature": 0.5}))

    def num_tokens(*options: str) -> int:
        done = run("generate", "x", "--json", "--ignore-eos", "--model", folder, *options)
        return len(json_lines(done)[0]["token_ids"])

    assert num_tokens() == 7
    messages = [{"role": "user", "content": "x"}]
    prompt_len = len(Tokenizer.load(model).apply_chat_template(messages, add_generation_prompt=True))
    assert num_tokens("--generation-config", "vllm", "--max-model-len", "0.1k") == 100 - prompt_len


def test_one_bad_prompt_of_a_batch_is_named(generate: list[str]):
    done = run(*generate, "--file", "-", "--max-model-len", "24", stdin="hi\n" + "word " * 40)
    assert_is_one_line_error(done, "prompt 2 of 2", "maximum context length is 24")


def test_a_refused_prompt_prints_nothing_but_why(generate: list[str]):
    assert_is_one_line_error(run(*generate, "x", "--max-model-len", "2"), "maximum context length is 2")


def test_messages_of_the_engine_are_shown_on_request_only(generate: list[str]):
    options = [*generate, "x", "--max-tokens", "1"]
    assert run(*options, NANOVLLM_LOGGING_LEVEL="").stderr == ""
    old_names = ["--swap-space", "4", "--disable_log_requests"]  # taken, with a word about them
    messages = run(*options, *old_names, "--verbose", NANOVLLM_LOGGING_LEVEL="").stderr
    assert "KV cache size" in messages
    assert "swap_space is retired" in messages and "disable_log_requests is retired" in messages


def test_a_closed_pipe_ends_the_program_quietly(generate: list[str]):
    process = start(*generate, "x", "--max-tokens", "8000")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""

    process = start("generate", "--help")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr.read() == b""


def test_ctrl_c_ends_the_program_quietly(generate: list[str]):
    process = start(*generate, "x", "--max-tokens", "8000")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert process.stderr.read() == b""


# -- collect-env


def test_the_environment_is_described(tmp_path: Path):
    broken = tmp_path / "torch_npu"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('libascendcl.so: no such file')")
    variables = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "HF_TOKEN": "hf_verysecret",
        "VLLM_API_KEY": "verysecret",
        "HTTPS_PROXY": "http://user:verysecret@proxy:8080",
        "HF_ENDPOINT": "https://mirror.example",
        "ASCEND_RT_VISIBLE_DEVICES": "0,3",
        "UNRELATED": "unrelatedvalue",
    }
    done = run("collect-env", "--json", **variables)
    assert done.returncode == 0 and done.stderr == ""
    report = json.loads(done.stdout)
    assert report["nanovllm"]["version"] == nanovllm.__version__
    assert report["torch"]["version"] == report["packages"]["torch"]
    assert report["torch"]["threads"] == 1
    assert "libascendcl.so: no such file" in report["NPU"]["torch_npu"]
    assert report["CPU"]["logical CPUs"] == os.cpu_count()
    assert report["environment"]["HF_ENDPOINT"] == "https://mirror.example"
    assert report["environment"]["ASCEND_RT_VISIBLE_DEVICES"] == "0,3"
    assert "verysecret" not in done.stdout and "unrelatedvalue" not in done.stdout
    assert "proxy:8080" in report["environment"]["HTTPS_PROXY"]


def test_the_environment_is_described_without_torch(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: file too short')")
    done = run("collect-env", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0 and done.stderr == ""
    assert "torch: failed with exit code 1: OSError: libtorch_cpu.so: file too short" in done.stdout
    assert "CPU:" in done.stdout and "OMP_NUM_THREADS: 1" in done.stdout
