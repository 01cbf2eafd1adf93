"""What Ascend NPUs could do on Nano-vLLM's benchmark, by calculation: nothing here was measured by us on an NPU.

    python benchmarks/npu_cost_model.py

256 requests at once, prompts and outputs of 100-1,024 tokens, Qwen3-0.6B in 16 bits, one device, prefix cache off. Two
figures for each number of requests that run at once:

- the limit: bytes of keys, values and weights over the memory's peak rate, plus operations of the prompts over the peak
  of the matrix units. Nothing can be faster.
- what is expected: the same with the shares of these peaks that good kernels reach, plus the time a step takes that
  neither bytes nor operations explain (graph replay, small kernels, sampling).

Beside them the figures that Nano-vLLM-Ascend publishes for its own engine on a 910C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from report import print_table
from workloads import QWEN3_0_6B, nano_requests, parameters


@dataclass(frozen=True)
class Device:
    """One device as torch sees it, with the peaks its maker states.

    Attributes:
        bytes_per_s: of memory.
        operations_per_s: of 16-bit products.
    """

    name: str
    bytes_per_s: float
    operations_per_s: float


# 910B with 64 GB: Atlas 800T A2's data sheet: 376 TFLOPS in FP16 (a slower bin 313), HBM at 1.6 TB/s.
# 910C: two such dies in a package, 752 TFLOPS and 3.2 TB/s together (Zuo et al. 2025, "Serving Large Language Models on
# Huawei CloudMatrix384", section 3.3.1); torch sees each die as a device.
# 310P: Atlas 300I Duo's data sheet: 140 TFLOPS in FP16 and LPDDR4X at 408 GB/s for the card's two chips.
DEVICES = (
    Device("910B, or a die of a 910C", 1.6e12, 376e12),
    Device("310P, one chip", 204e9, 70e12),
)

# Published by Nano-vLLM-Ascend for its engine on a 910C: most requests at once -> output tokens per second.
PUBLISHED_910C = {16: 1249, 32: 1765, 48: 2066, 64: 2478, 128: 3110, 256: 3954}


@dataclass(frozen=True)
class Assumptions:
    """How much of the peaks is reached. These are guesses, to be replaced by measurements.

    Attributes:
        of_bandwidth: share of the memory's rate when weights, keys and values are read.
        of_operations: share of the matrix units' rate in prompts.
        step_s: seconds of a step that neither bytes nor operations explain: some 300 kernels of a few microseconds each
            in a graph, which overlap little when they are small.
    """

    of_bandwidth: float = 0.65
    of_operations: float = 0.45
    step_s: float = 2.5e-3


LIMIT = Assumptions(1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Work:
    """What a run has to do, whatever does it.

    Attributes:
        steps: decode steps.
        bytes_read: keys and values of every token that decodes, and all weights once per step.
        operations: of computing the prompts.
        output_tokens: generated tokens.
    """

    steps: int
    bytes_read: float
    operations: float
    output_tokens: int


def work(lengths: list[tuple[int, int]], at_once: int, shape: dict[str, Any]) -> Work:
    """The work of ``lengths`` with at most ``at_once`` requests running, in order of arrival; 16 bits throughout.

    A request holds a place until its last token. The prompt's step gives the first token; each of the others reads the
    keys and values of everything before it.
    """
    layers, head = parameters(shape)
    token_bytes = 2 * shape["num_key_value_heads"] * shape["head_dim"] * shape["num_hidden_layers"] * 2
    pair = 4 * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    ends = [0] * at_once  # the step at which each place is free again
    for _, output in lengths:
        place = ends.index(min(ends))
        ends[place] += output
    steps = max(ends)
    history = sum((output - 1) * prompt + output * (output - 1) / 2 for prompt, output in lengths)
    operations = sum(2 * layers * prompt + 2 * head + pair * prompt * (prompt + 1) / 2 for prompt, _ in lengths)
    bytes_read = history * token_bytes + steps * (layers + head) * 2
    return Work(steps, bytes_read, operations, sum(output for _, output in lengths))


def tokens_per_s(device: Device, work: Work, assumed: Assumptions) -> float:
    """Output tokens per second; decoding and prompts one after the other, as they share the device."""
    seconds = (
        work.bytes_read / (device.bytes_per_s * assumed.of_bandwidth)
        + work.operations / (device.operations_per_s * assumed.of_operations)
        + work.steps * assumed.step_s
    )
    return work.output_tokens / seconds


def main() -> None:
    prompts, outputs = nano_requests(256, 1024)
    lengths, assumed = list(zip(map(len, prompts), outputs, strict=True)), Assumptions()
    print(f"A calculation, no measurement. Assumed: {assumed}")
    head = ["requests at once"]
    for device in DEVICES:
        head += [f"{device.name}: limit", "expected"]
    rows: list[list[Any]] = []
    for at_once, published in PUBLISHED_910C.items():
        load = work(lengths, at_once, QWEN3_0_6B)
        row: list[Any] = [at_once]
        for device in DEVICES:
            row += [tokens_per_s(device, load, LIMIT), tokens_per_s(device, load, assumed)]
        rows.append([*row, published])
    print_table([*head, "published, 910C"], rows)


if __name__ == "__main__":
    main()
