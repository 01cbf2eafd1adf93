"""Trains the demo model that is shipped in ``nanovllm/assets/demo``.

    python scripts/train_demo_model.py

writes checkpoints, a log and a loss plot to ``build/demo`` and, at the end, the model to ``build/demo/model``. Run it
again after an interruption and it goes on where it stopped. Look at the result with ``scripts/eval_demo_model.py``,
then ship it with ``--install``. The text is generated from ``scripts/demo_data``; the same seed gives the same text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from demo_data.chat import END_OF_TEXT, END_OF_TURN
from demo_data.corpus import Corpus
from demo_data.model import Qwen3, Shape
from demo_data.tokenizer import save_tokenizer, train_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "nanovllm" / "assets" / "demo"
CHUNK = 2048  # examples drawn, sorted by length and batched together
# What only the evaluation reads, and of that the questions.
HELD_OUT = ("held_out.txt", "held_out_tools.txt")
EVALUATION = (*HELD_OUT, "questions.py", "facts.py")


Row = list[tuple[list[int], float]]  # a text: its parts as token ids, with the weights of their losses
Forward = Callable[[Tensor, Tensor], Tensor]  # logits of token ids at positions: the model, compiled or not


@dataclass(frozen=True)
class Batch:
    """Texts of similar length, padded on the right, where causal attention never looks."""

    ids: Tensor  # [texts, length] int64
    at: Tensor  # [targets] flat positions whose next token counts
    targets: Tensor  # [targets] the next tokens
    weights: Tensor  # [targets] float32
    place: tuple[int, int]  # the chunk it was drawn from, and its number there


@dataclass(frozen=True)
class Trained:
    """What training leaves."""

    model: Qwen3
    shape: Shape
    log: list[dict[str, Any]]  # one entry every twenty steps
    made_with: dict[str, str]  # the hashes of the script and the data at the start
    changes: int  # how often these changed on the way; if ever, the run is not that of its seed


def main() -> None:
    """Parses the command line, trains and exports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "demo", help="working folder (default: build/demo)"
    )
    parser.add_argument("--steps", type=int, default=12000, help="optimiser steps (default: 12000)")
    parser.add_argument("--step-tokens", type=int, default=3072, help="tokens per step, padding included")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument(
        "--decay", type=float, default=0.3, help="last part of the steps in which the rate falls to zero"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--workers", type=int, default=2, help="the two batches of a step at once or not (1); the result is the same"
    )
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--tokenizer", type=Path, default=None, help="use this tokenizer.json instead of training one")
    parser.add_argument(
        "--eager", action="store_true", help="without torch.compile: no C++ compiler needed, but a third slower"
    )
    parser.add_argument("--small", action="store_true", help="the small sibling, for speculative decoding")
    parser.add_argument("--install", action="store_true", help="copy the finished model into the package and end")
    args = parser.parse_args()
    if args.install:
        install(args.out / "model", ASSETS)
        return
    torch.set_num_threads(1)  # sums in one order: the same weights on any number of cores
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus()
    tokenizer = load_tokenizer(args.out, corpus, args.seed, args.tokenizer)
    shape = SMALL if args.small else Shape()
    export(train(args, shape, corpus, tokenizer), tokenizer, args, args.out / "model")
    print(f"The model is in {args.out / 'model'}; `--install` ships it.")


SMALL = Shape(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def load_tokenizer(out: Path, corpus: Corpus, seed: int, given: Path | None) -> Tokenizer:
    """The tokenizer of the working folder, trained on first use."""
    path = given or out / "tokenizer.json"
    if not path.exists():
        rng = Random(f"{seed}/tokenizer")
        examples = [corpus.draw(rng) for _ in range(30000)]
        tokenizer = train_tokenizer((example.text for example in examples), Shape().vocab_size)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def batches(corpus: Corpus, tokenizer: Tokenizer, seed: int, size: int, after: tuple[int, int]) -> Iterator[Batch]:
    """Endless batches of at most ``size`` tokens that follow on place ``after``, a chunk and a batch of it."""
    for chunk in count(after[0]):
        rng = Random(f"{seed}/{chunk}")
        examples = [corpus.draw(rng, chunk) for _ in range(CHUNK)]
        encoded = iter(
            tokenizer.encode_batch([text for e in examples for text, _ in e.parts], add_special_tokens=False)
        )
        rows = [[(next(encoded).ids, weight) for _, weight in example.parts] for example in examples]
        rows.sort(key=row_length)
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * row_length(row) > size:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for number, group in enumerate(groups):
            if (chunk, number) > after:
                yield make_batch(group, (chunk, number))


def row_length(row: Row) -> int:
    """The number of tokens of a row."""
    return sum(len(ids) for ids, _ in row)


def make_batch(rows: list[Row], place: tuple[int, int] = (0, 0)) -> Batch:
    """A batch of texts; a token's weight is that of its part, the first token of a text has none."""
    length = max(map(row_length, rows))
    height = max(
        len(rows), 2
    )  # a lone text gets an empty one beside it: one compiled program serves every height but 1
    ids = torch.zeros(height, length, dtype=torch.int64)
    weights = torch.zeros(height, length)
    for number, row in enumerate(rows):
        end = row_length(row)
        ids[number, :end] = torch.tensor([token for part, _ in row for token in part])
        # A position predicts the token after it.
        weights[number, : end - 1] = torch.tensor([weight for part, weight in row for _ in part][1:])
    at = weights.flatten().nonzero().squeeze(1)
    return Batch(ids, at, ids.flatten()[at + 1], weights.flatten()[at], place)


def train(args: argparse.Namespace, shape: Shape, corpus: Corpus, tokenizer: Tokenizer) -> Trained:
    """Trains from the last checkpoint, or from the start."""
    torch.manual_seed(args.seed)
    model = Qwen3(shape).to(args.device)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = {"lr": args.learning_rate, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
    optimizers: list[torch.optim.Optimizer] = [  # Muon in two halves, for two workers
        torch.optim.Muon(matrices[::2], **muon),
        torch.optim.Muon(matrices[1::2], **muon),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    step, place, log = 0, (0, -1), []
    made_with, changes = hashes(), 0
    path = args.out / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, place, log = state["step"], state["place"], state["log"]
        changes = state["changes"] + (state["made_with"] != made_with)
        made_with = state["made_with"]
    parameters = list(model.parameters())
    forward = model if args.eager else compiled(model, args.device)
    workers = ThreadPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,))
    stream = batches(corpus, tokenizer, args.seed, args.step_tokens // 2, place)
    progress = tqdm(total=args.steps, initial=step, unit="step", dynamic_ncols=True)
    started, loss_sum, tokens = time.time(), 0.0, 0
    while step < args.steps:
        rate = args.learning_rate * schedule(step, args.steps, args.decay)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        # Two batches a step, because the texts of one have one length and often one subject.
        pair = [next(stream), next(stream)]
        place = pair[-1].place
        total = sum(float(batch.weights.sum()) for batch in pair)
        results = list(workers.map(partial(gradients, forward, parameters, total, args.device), pair))
        for number, parameter in enumerate(parameters):
            parameter.grad = results[0][1][number] + results[1][1][number]
        loss_sum += sum(loss for loss, _ in results)
        tokens += sum(batch.ids.numel() for batch in pair)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        list(workers.map(lambda optimizer: optimizer.step(), optimizers))
        model.zero_grad(set_to_none=True)
        step += 1
        progress.update()
        if step % 20 == 0 or step == args.steps:
            entry = {
                "step": step,
                "loss": round(loss_sum / (step % 20 or 20), 4),
                "tokens": tokens,
                "seconds": round(time.time() - started, 1),
            }
            progress.set_postfix(loss=f"{entry['loss']:.3f}", rate=f"{rate:.1e}")
            log.append(entry)
            started, loss_sum, tokens = time.time(), 0.0, 0
        if step % args.checkpoint_every == 0 or step == args.steps:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"step": step, "place": place, "log": log, "made_with": made_with, "changes": changes}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            (args.out / "log.json").write_text(json.dumps(log))
            plot(log, args.out / "loss.png")
    progress.close()
    workers.shutdown()
    return Trained(model, shape, log, made_with, changes)


def compiled(model: Qwen3, device: str) -> Forward:
    """``model`` compiled for batches of any size, on one of a fixed size: the code depends on no batch of the run."""
    forward: Forward = torch.compile(model, dynamic=True)
    rows: list[Row] = [[([1] * 40, 0.0), ([2] * 40, 1.0)]] * 19
    gradients(forward, list(model.parameters()), 1.0, device, make_batch(rows))
    return forward


def gradients(
    forward: Forward, parameters: list[Tensor], total: float, device: str, batch: Batch
) -> tuple[float, tuple[Tensor, ...]]:
    """The loss of ``batch`` over ``total``, the weight of the whole step, and its gradients."""
    loss = batch_loss(forward, batch, device) / total
    return loss.item(), torch.autograd.grad(loss, parameters)


def batch_loss(forward: Forward, batch: Batch, device: str) -> Tensor:
    """The weighted sum of the cross entropies."""
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, cache_enabled=False):
        logits = forward(batch.ids.to(device), batch.at.to(device))
    losses = F.cross_entropy(logits.float(), batch.targets.to(device), reduction="none")
    return (losses * batch.weights.to(device)).sum()


def schedule(step: int, steps: int, decay: float) -> float:
    """Warm up, hold, and fall to zero over the last ``decay`` part."""
    warm = min(100, steps // 10)
    if step < warm:
        return (step + 1) / warm
    start = steps * (1 - decay)
    return 1.0 if step < start else max(0.02, (1 + math.cos(math.pi * (step - start) / (steps - start))) / 2)


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """The loss over the steps as a picture, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log])
    axes.set(xlabel="step", ylabel="loss (nats per weighted token)", yscale="log", title="Training of the demo model")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def hashes() -> dict[str, str]:
    """SHA-256 of this script and of everything the text is generated from."""
    files = sorted((ROOT / "scripts" / "demo_data").glob("*.*"))
    data = [path for path in files if path.name not in EVALUATION]
    return {"script_sha256": digest([Path(__file__)]), "data_sha256": digest(data)}


def digest(paths: list[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def export(trained: Trained, tokenizer: Tokenizer, args: argparse.Namespace, folder: Path) -> None:
    """Writes the checkpoint folder that engines load: weights in bfloat16, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(END_OF_TEXT)]
    weights = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in trained.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder, trained.shape.max_position_embeddings)
    files: dict[str, dict[str, Any]] = {
        "config.json": trained.shape.config(ends[1], ends[0]),
        "generation_config.json": {
            "bos_token_id": ends[1],
            "eos_token_id": ends,
            "pad_token_id": ends[1],
            "do_sample": True,
            "temperature": 0.3,
            "top_p": 0.9,
            "top_k": 20,
            "max_new_tokens": 256,
        },
        "training.json": {
            "seed": args.seed,
            "steps": args.steps,
            "tokens": sum(entry["tokens"] for entry in trained.log),
            "minutes": round(sum(entry["seconds"] for entry in trained.log) / 60, 1),
            "loss": trained.log[-1]["loss"],
            "parameters": sum(value.numel() for value in weights.values()),
            "device": args.device,
            "torch": torch.__version__,
            **trained.made_with,
            "changes": trained.changes,
            "held_out_sha256": digest([ROOT / "scripts" / "demo_data" / name for name in HELD_OUT]),
            "learning_rate": args.learning_rate,
            "decay": args.decay,
            "step_tokens": args.step_tokens,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def install(source: Path, target: Path) -> None:
    """Ships the finished model."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        shutil.copy(path, target / path.name)
    print(f"{sum(path.stat().st_size for path in target.iterdir()) / 1e6:.2f} MB in {target}")


if __name__ == "__main__":
    main()
