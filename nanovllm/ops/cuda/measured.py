"""The choice of attention by measurement: which of those that are installed is fastest on this GPU, for this model.

    tune(shape):  candidates --decodes--> times --> the fastest decodes
                             --prompts--> times --> the fastest takes longer queries

What was found is kept in a file, by GPU, versions and shape, so that it is measured once and does not change from one
start to the next.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.ops.cuda.attention import DecodePlan, Layer, LongPlan, TritonAttention
from nanovllm.ops.metadata import AttentionMetadata
from nanovllm.ops.operators import AttentionShape

logger = logging.getLogger("nanovllm")

_ROWS, _CONTEXT, _PROMPTS = 64, 1024, 4  # decodes, tokens of each row, rows that are prompts
_TABLE_WIDTH = 1024  # blocks of a row that recorded decodes have room for: some cut rows by what they could hold
_GAIN = 0.97  # another has to be so much faster than Triton's
_DIFFERENCE = 0.03  # from Triton's result, of numbers about 1: more than rounding to bfloat16 explains

Clock = Callable[[Callable[[], object]], float]
Times = dict[str, float]  # by candidate: seconds


class MeasuredAttention(TritonAttention):
    """Decodes and longer queries, each with the fastest candidate; Triton's kernels until ``tune`` is called.

    Args:
        candidates: by name, "triton" among them.
        device: what the choice depends on besides the shape, in words.
        clock: seconds that some work takes on the device.
        folder: where the choice is kept; None: nowhere.
    """

    def __init__(
        self,
        multiprocessors: int,
        shared_memory: int,
        candidates: Mapping[str, TritonAttention],
        device: str,
        clock: Clock,
        folder: Path | None,
    ) -> None:
        super().__init__(multiprocessors, shared_memory)
        self._candidates, self._device, self._clock = candidates, device, clock
        self._file = None if folder is None else folder / "attention.json"
        self.decodes_with = self.long_with = "triton"

    def decode(self, layer: Layer, plan: DecodePlan) -> None:
        """See `TritonAttention.decode`."""
        self._candidates[self.decodes_with].decode(layer, plan)

    def long(self, layer: Layer, plan: LongPlan) -> None:
        """See `TritonAttention.long`."""
        self._candidates[self.long_with].long(layer, plan)

    @torch.inference_mode()
    def tune(self, shape: AttentionShape, device: torch.device) -> None:
        """Choose for a model's shape: as was found before, or by measurement, which takes some tenths of a second."""
        if len(self._candidates) == 1:
            logger.info("Attention: triton")
            return
        key = f"{self._device}; {', '.join(self._candidates)}; {shape}"
        kept = _read(self._file).get(key)
        if isinstance(kept, list) and len(kept) == 2 and all(name in self._candidates for name in kept):
            self.decodes_with, self.long_with = kept
            logger.info("Attention: decodes %s, longer queries %s, as measured before", *kept)
            return
        started = time.perf_counter()
        try:
            decodes, long = self._measure(shape, device, prompts=False), self._measure(shape, device, prompts=True)
        except torch.OutOfMemoryError:
            logger.warning("Attention: triton; there is no memory to measure others")
            return
        self.decodes_with, self.long_with = _fastest(decodes), _fastest(long)
        _write(self._file, key, [self.decodes_with, self.long_with])
        told = _told(self.decodes_with, decodes), _told(self.long_with, long), time.perf_counter() - started
        logger.info("Attention: decodes %s, longer queries %s, measured in %.2f s", *told)

    def _measure(self, shape: AttentionShape, device: torch.device, prompts: bool) -> Times:
        """What each candidate takes for a layer; those that fail, or differ from Triton, are left out."""
        count, length = (_PROMPTS if prompts else min(_ROWS, shape.rows)), min(_CONTEXT, shape.longest)
        width = -(-length // shape.block_size)
        cache_shape = (count * width + 1, shape.block_size, shape.num_kv_heads, shape.head_dim)
        caches = [torch.randn(cache_shape, dtype=shape.dtype, device=device).to(shape.kv_dtype) for _ in range(2)]
        new = length if prompts else 1
        q = torch.randn(count * new, shape.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
        table = torch.zeros(count, width if prompts else max(width, _TABLE_WIDTH), dtype=torch.int32, device=device)
        table[:, :width] = torch.arange(1, count * width + 1, device=device).view(count, width)
        starts = [row * new for row in range(count + 1)]
        decodes = count if new == 1 else 0
        slots = torch.zeros(count * new, dtype=torch.int64, device=device)  # nothing is written
        meta = AttentionMetadata(starts, [length] * count, decodes, new, length, table, slots, shape.block_size)
        self.prepare_attention(meta, [shape.window], shape.dtype)

        def attend(candidate: TritonAttention) -> Tensor:
            return candidate.paged_attention(q, caches[0], caches[1], meta, shape.head_dim**-0.5, shape.window)

        wanted = attend(self._candidates["triton"])
        times: Times = {}
        for name, candidate in self._candidates.items():
            method = type(candidate).long if prompts else type(candidate).decode
            if name != "triton" and method in (TritonAttention.long, TritonAttention.decode):
                continue
            try:
                difference = (attend(candidate) - wanted).abs().max().item()
                if not difference < _DIFFERENCE:
                    logger.warning("Attention: %s is not used, its results are off by %.3g", name, difference)
                    continue
                times[name] = self._clock(lambda candidate=candidate: attend(candidate))  # type: ignore[misc]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a library that does not fit this torch or this GPU
                logger.warning("Attention: %s is not used, it does not run here: %s", name, error)
        return times


def device_seconds(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes on the GPU: the least of some rounds, as launches of a step follow each other."""
    rounds, repeats = 5, 8
    least = float("inf")
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        least = min(least, begin.elapsed_time(end) / 1e3 / repeats)
    return least


def versions() -> str:
    """What decides which kernels run, besides the GPU."""
    found = []
    for package in ("torch", "triton", "flash-attn", "flash-attn-3", "flashinfer-python"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def cache_folder() -> Path:
    """Where this program keeps what it can find out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"


def _fastest(times: Times) -> str:
    best = min(times, key=times.__getitem__)
    return best if times[best] < _GAIN * times["triton"] else "triton"


def _told(chosen: str, times: Times) -> str:
    others = "".join(f", {name} {seconds * 1e6:.0f}" for name, seconds in times.items() if name != chosen)
    return f"{chosen} ({times[chosen] * 1e6:.0f} us{others})"


def _read(file: Path | None) -> dict[str, object]:
    try:
        kept = json.loads(file.read_text()) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(file: Path | None, key: str, chosen: list[str]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({**_read(file), key: chosen}, indent=1))
        new.replace(file)
    except OSError as error:  # it will be measured again
        logger.debug("The choice of attention is not kept: %s", error)
