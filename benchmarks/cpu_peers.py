"""Our engine and others on three CPU workloads, with the machine's limits beside them.

The model has Qwen3-0.6B's shape and random bfloat16 weights; all engines get the same. Each runs in a process of its
own, in turn, several rounds; every round also measures memory bandwidth and the speed of a bfloat16 matrix product.
Medians over the rounds are what counts.

    python benchmarks/cpu_peers.py --peer llama.cpp=LLAMA/bin/python --peer vllm=VLLM/bin/python

- ``bs1``: prompt of 32 tokens, 64 new ones, greedy; output tokens per second
- ``prefill``: prompt of 1,024 tokens, one new token; prompt tokens per second
- ``batch``: 32 requests at once, prompts of 64 to 256 tokens, outputs of 32 to 96, temperature 0.6; output tokens per
  second

A peer is known by the Python it is installed for, from ``--peer`` or the environment (NANOVLLM_PEER_VLLM,
NANOVLLM_PEER_LLAMA_CPP, NANOVLLM_PEER_OPENVINO); a peer without is named as skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import RESULTS, print_table, write_results
from workloads import SHAPES, limits, workloads

HERE = Path(__file__).resolve().parent
MODELS = Path.home() / ".cache" / "nanovllm-peers"


@dataclass(frozen=True)
class Engine:
    """An engine in one number format.

    Attributes:
        peer: whose Python runs it.
        module: in peers/.
        bits: of a weight.
    """

    peer: str
    module: str
    number_format: str
    bits: float = 16.0


ENGINES = {
    "nanovllm bf16": Engine("nanovllm", "nanovllm", "bf16"),
    "nanovllm int8": Engine("nanovllm", "nanovllm", "int8", 8.0),
    "nanovllm w8a8": Engine("nanovllm", "nanovllm", "w8a8", 8.0),
    "nanovllm int4": Engine("nanovllm", "nanovllm", "int4", 4.25),
    "transformers bf16": Engine("transformers", "transformers", "bf16"),
    "vllm bf16": Engine("vllm", "vllm", "compiled"),
    "vllm bf16 eager": Engine("vllm", "vllm", "eager"),
    "llama.cpp bf16": Engine("llama.cpp", "llamacpp", "bf16"),
    "llama.cpp q8_0": Engine("llama.cpp", "llamacpp", "q8_0", 8.5),
    "llama.cpp q4_0": Engine("llama.cpp", "llamacpp", "q4_0", 4.5),
    "openvino bf16": Engine("openvino", "openvino", "fp16"),
    "openvino int8": Engine("openvino", "openvino", "int8", 8.0),
}
# What each of our formats is measured against.
RIVALS = {
    "nanovllm bf16": [name for name, e in ENGINES.items() if e.bits == 16.0 and e.peer != "nanovllm"],
    "nanovllm int8": ["llama.cpp q8_0", "openvino int8"],
    "nanovllm w8a8": ["llama.cpp q8_0", "openvino int8", "nanovllm bf16"],
    "nanovllm int4": ["llama.cpp q4_0", "nanovllm bf16"],
}


def pythons(given: list[str]) -> dict[str, str]:
    """The Python of every peer there is."""
    found = {"nanovllm": sys.executable}
    if importlib.util.find_spec("transformers"):
        found["transformers"] = sys.executable
    for peer in ("vllm", "llama.cpp", "openvino"):
        if named := os.environ.get(f"NANOVLLM_PEER_{peer.upper().replace('.', '_')}"):
            found[peer] = named
    for each in given:
        peer, _, python = each.partition("=")
        if peer not in {engine.peer for engine in ENGINES.values()} or not python:
            raise SystemExit(f"--peer {each}: give one of transformers, vllm, llama.cpp, openvino as NAME=PYTHON")
        found[peer] = python
    return found


def run(command: list[str], prefix: str = "", where: Path = HERE) -> str:
    """Run a command in a process of its own; returns what it prints."""
    root = str(HERE.parent)
    environment = {
        **os.environ,
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [*shlex.split(prefix), *command]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def measure_limits(scale: float) -> dict[str, float]:
    """Bytes per second of reading memory, operations per second of a bfloat16 matrix product: best of several."""
    import torch

    def best(function: Any, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    memory = memory_to_read(max(1, int(scale * 1024)))
    size = max(64, int(scale * 4096))
    left, right = torch.ones(size, size, dtype=torch.bfloat16), torch.ones(size, size, dtype=torch.bfloat16)
    return {
        "bandwidth": memory.nbytes / best(memory.max, 16),
        "flops": 2 * size**3 / best(lambda: torch.nn.functional.linear(left, right), 8),
        "threads": torch.get_num_threads(),
    }


def memory_to_read(mebibytes: int) -> Any:
    """A float32 tensor in huge pages, whose ``max()`` shows how fast memory is read."""
    import torch

    pages = mmap.mmap(-1, mebibytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # small pages cost a fifth of the speed
    return torch.frombuffer(pages, dtype=torch.float32).fill_(1.0)


def make_checkpoint(shape: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint with random weights, and a tokenizer of single bytes for those who insist on one."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def prepare(name: str, python: str, options: argparse.Namespace) -> str:
    """The folder an engine loads its model from; made if it is not there yet."""
    engine, checkpoint = ENGINES[name], options.models / options.shape
    if not (checkpoint / "tokenizer.json").is_file():
        run([sys.executable, str(HERE / "cpu_peers.py"), "--shape", options.shape, "--worker", str(checkpoint)])
    if engine.peer == "llama.cpp":
        folder = options.models / f"{options.shape}-gguf"
        folder.mkdir(exist_ok=True)
        target = folder / f"{engine.number_format}.gguf"
        if not target.is_file():
            part = target.with_suffix(".part")
            run([python, "-m", "peers.llamacpp", "convert", str(checkpoint), str(part), engine.number_format])
            part.rename(target)
        return str(folder)
    if engine.peer == "openvino":
        folder = options.models / f"{options.shape}-openvino"
        target = folder / engine.number_format
        if not (target / "openvino_model.bin").is_file():
            run([str(Path(python).parent / "optimum-cli"), "export", "openvino", "--model", str(checkpoint), "--task",
                 "text-generation-with-past", "--weight-format", engine.number_format, str(target)])  # fmt: skip
        return str(folder)
    return str(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="where a peer is installed")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="all that are installed")
    parser.add_argument("--workloads", nargs="+", choices=list(workloads()), default=list(workloads()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefix", default="", help="command before every measured process, as 'taskset -c 0-3'")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of models, kept between runs")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-0.6b", help="tiny only shows that it runs")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: shorter prompts and outputs")
    parser.add_argument("--output", type=Path, default=RESULTS / f"cpu-peers-{time.strftime('%Y-%m-%d')}.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "limits":
        print(json.dumps(measure_limits(options.scale)))
        return
    if options.worker:
        make_checkpoint(SHAPES[options.shape], Path(options.worker))
        return

    options.models = options.models.resolve()
    options.models.mkdir(parents=True, exist_ok=True)
    python = pythons(options.peer)
    wanted = options.engines or list(ENGINES)
    skipped = {name: f"no Python given (--peer {ENGINES[name].peer}=PATH)" for name in wanted
               if ENGINES[name].peer not in python}  # fmt: skip
    folders: dict[str, str] = {}
    for name in wanted:
        if name not in skipped:
            print(f"preparing {name}", flush=True)
            try:
                folders[name] = prepare(name, python[ENGINES[name].peer], options)
            except RuntimeError as error:
                skipped[name] = str(error)

    rounds: dict[str, list[dict[str, float]]] = {task: [] for task in ("limits", *folders)}
    for number in range(options.rounds):
        for task, measured in rounds.items():
            if task in skipped:
                continue
            print(f"round {number + 1} of {options.rounds}: {task}", flush=True)
            if task == "limits":
                command = [sys.executable, str(HERE / "cpu_peers.py"), "--worker", "limits"]
            else:
                engine = ENGINES[task]
                command = [python[engine.peer], "-m", f"peers.{engine.module}", folders[task], engine.number_format,
                           "--workloads", *options.workloads]  # fmt: skip
            try:
                output = run([*command, "--scale", str(options.scale)], options.prefix)
                measured.append(json.loads(next(x for x in reversed(output.splitlines()) if x.startswith("{"))))
            except RuntimeError as error:
                if task == "limits":
                    raise
                skipped[task] = str(error)
    report(options, {task: measured for task, measured in rounds.items() if measured}, skipped)


def report(options: argparse.Namespace, rounds: dict[str, list[dict[str, float]]], skipped: dict[str, str]) -> None:
    """Print and write medians, the share of the limits, and the ratios to the best peer."""
    works = {name: work for name, work in workloads(options.scale).items() if name in options.workloads}
    machine = _medians(rounds["limits"])
    engines = [name for name in rounds if name != "limits"]
    medians = {name: _medians(rounds[name]) for name in engines}
    speeds = {name: {w: work.num_tokens / medians[name][w] for w, work in works.items()} for name in engines}
    most = {
        name: limits(SHAPES[options.shape], options.scale, machine["bandwidth"], machine["flops"], ENGINES[name].bits)
        for name in engines
    }
    ratios = {}
    for ours in (name for name in engines if name in RIVALS):
        for work in works:
            rivals = {name: speeds[name][work] for name in RIVALS[ours] if name in speeds}
            for kind in ("peer", "ours"):
                among = [name for name in rivals if (ENGINES[name].peer == "nanovllm") == (kind == "ours")]
                if among:
                    best = max(among, key=rivals.__getitem__)
                    ratios[f"{ours}, {work}, over {best}"] = speeds[ours][work] / rivals[best]
    print(f"\nmemory {machine['bandwidth'] / 1e9:.1f} GB/s, bfloat16 {machine['flops'] / 1e9:,.0f} GFLOP/s, "
          f"{machine['threads']:.0f} threads; tokens per second and share of the limit, medians of {options.rounds} "
          "rounds\n")  # fmt: skip
    rows = [
        [name, *(x for w in works for x in (speeds[name][w], speeds[name][w] / most[name][w])), medians[name]["ready"]]
        for name in engines
    ]
    print_table(["engine", *(x for work in works for x in (work, "of limit")), "ready (s)"], rows)
    print()
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}")
    write_results(
        options.output,
        shape=options.shape,
        scale=options.scale,
        limits=machine | {"tokens_per_second": most},
        tokens_per_second=speeds,
        ratios=ratios,
        seconds=medians,
        skipped=skipped,
        rounds=rounds,
    )
    plot(options.output.with_suffix(".png"), speeds, most)


def plot(file: Path, speeds: dict[str, dict[str, float]], most: dict[str, dict[str, float]]) -> None:
    """A bar per engine and workload, with a mark where its limit is."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(reversed(speeds))
    works = list(speeds[names[0]])
    figure, axes = plt.subplots(1, len(works), figsize=(4.2 * len(works), 0.42 * len(names) + 1.2), sharey=True,
                                squeeze=False)  # fmt: skip
    for axis, work in zip(axes[0], works, strict=True):
        colors = ["#1f6fb2" if name.startswith("nanovllm") else "#b8bec6" for name in names]
        axis.barh(names, [speeds[name][work] for name in names], color=colors)
        places = range(len(names))
        axis.scatter([most[name][work] for name in names], places, marker="|", s=160, color="#c0392b", label="limit")
        for place, name in zip(places, names, strict=True):
            axis.text(speeds[name][work], place, f" {speeds[name][work]:.0f}", va="center", fontsize=8)
        axis.set_title(f"{work}: tokens/s")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    print(f"written: {file}")


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


if __name__ == "__main__":
    main()
