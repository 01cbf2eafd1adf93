"""Checkpoint files -> parameters.

Each tensor is read from its file straight into its place, already fused and split. One that must be converted passes
through a copy; beside the model there are never more than a few of those. Several threads read, and what is complete is
packed meanwhile. A checkpoint must fit the model exactly: missing, unexpected and misshapen tensors are errors.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanovllm.errors import ModelError
from nanovllm.layers.weights import Slots, WeightSlot
from nanovllm.model_files import checkpoint_files, some_of
from nanovllm.models.decoder import Decoder
from nanovllm.models.tensor_file import TensorFile

_PROGRESS_BYTES = 4 << 30  # a load below this takes a second or two: no progress bar
_PIECE_BYTES = 16 << 20  # larger tensors are read by several threads
_READ_AHEAD = 8  # tensors that are being read while another is packed
_DUMMY_POOL = 1_048_573  # a prime, so that no two rows of a dummy matrix are alike


def load_weights(model: Decoder, path: str | Path, load_format: str, seed: int) -> None:
    """Fill ``model`` and make it ready to run.

    ``load_format`` "auto" and "safetensors" read the folder ``path``; "dummy" draws random weights from ``seed``.
    Raises ModelError, with the names concerned, for a folder without weights, a damaged file, or a checkpoint that does
    not fit the model.
    """
    if load_format == "dummy":
        fill_with_random(model.slots(), seed)
    else:
        load_safetensors(model.slots(), checkpoint_files(Path(path)), _tied_head(model))
    model.finish()


def _tied_head(model: Decoder) -> str | None:
    """The name under which a checkpoint may repeat the embedding as the output head."""
    return f"{model.spec.names.head}.weight" if model.spec.tied else None


def load_safetensors(slots: Slots, files: list[Path], tied_head: str | None = None) -> None:
    """Fill every slot from ``files``, and finish layers as soon as all of theirs are filled; empties ``slots``.

    ``tied_head`` is the name of a tensor that may be there and is not needed.
    """
    missing = set(slots)
    unexpected: list[str] = []
    unfilled = Counter(id(slot.layer) for slot in slots.values())
    total = sum(file.stat().st_size for file in files)
    with (
        ThreadPoolExecutor(torch.get_num_threads(), "weights") as readers,
        tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=total < _PROGRESS_BYTES) as bar,
    ):
        for path in files:
            with TensorFile(path) as file:
                wanted: list[tuple[str, str]] = []  # tensor, slot
                for name in sorted(file.tensors, key=lambda name: file.tensors[name].start):
                    place = name if name in slots else f"model.{name}"  # a decoder saved alone lacks the prefix
                    if place in slots:
                        wanted.append((name, place))
                        missing.discard(place)
                    elif name != tied_head and not name.endswith(".rotary_emb.inv_freq"):
                        unexpected.append(name)
                reading: deque[tuple[WeightSlot, list[Future[None]]]] = deque()
                while wanted or reading:
                    while wanted and len(reading) < _READ_AHEAD:
                        name, place = wanted.pop(0)
                        slot = slots.pop(place)
                        reading.append((slot, _start_reading(readers, file, name, slot)))
                    slot, parts = reading.popleft()
                    for part in parts:
                        part.result()
                    bar.update(slot.target.nbytes)
                    unfilled[id(slot.layer)] -= 1
                    if slot.layer is not None and not unfilled[id(slot.layer)]:
                        slot.layer.finish()
    problems = []
    if missing:
        problems.append(f"missing {some_of(sorted(missing))}")
    if unexpected:
        problems.append(f"unexpected {some_of(sorted(unexpected))}")
    if problems:
        raise ModelError(
            f"the weights in {files[0].parent} do not fit the model of its config.json: " + "; ".join(problems)
        )


def _start_reading(readers: ThreadPoolExecutor, file: TensorFile, name: str, slot: WeightSlot) -> list[Future[None]]:
    """Have a checkpoint tensor, or this rank's part of it, read into its slot."""
    shape, dtype, target = file.tensors[name].shape, file.dtype(name), slot.target
    if shape != slot.shape:
        raise ModelError(
            f"{name} in {file.path} has shape {list(shape)}, the model of config.json needs {list(slot.shape)}"
        )
    straight = target.dtype == dtype and target.is_cpu and target.is_contiguous()
    if not straight or not (slot.whole or slot.dim == 0):
        return [readers.submit(_convert, file, name, slot)]
    first, flat = slot.start * (target.numel() // max(1, target.shape[0])), target.view(-1)
    step = _PIECE_BYTES // target.itemsize
    pieces = range(0, max(1, flat.numel()), step)
    return [readers.submit(file.read, name, first + begin, flat[begin : begin + step]) for begin in pieces]


def _convert(file: TensorFile, name: str, slot: WeightSlot) -> None:
    """Read a tensor, and copy what the slot takes of it to where and what it has to be."""
    value = torch.empty(slot.shape, dtype=file.dtype(name))
    file.read(name, 0, value)
    slot.target.copy_(value if slot.whole else value.narrow(slot.dim, slot.start, slot.target.shape[slot.dim]))


def fill_with_random(slots: Slots, seed: int) -> None:
    """Random weights of the usual size, quickly: norms 1, everything else normal with deviation 0.02.

    Each tensor is a stretch of a random pool that ``seed`` determines, beginning where the tensor's name says: the same
    in every run.
    """
    pool: Tensor | None = None
    for name, slot in slots.items():
        target = slot.target
        if target.dim() == 1 and name.endswith("norm.weight"):
            target.fill_(1.0)
            continue
        if pool is None:
            generator = torch.Generator().manual_seed(seed)
            pool = torch.empty(_DUMMY_POOL).normal_(0.0, 0.02, generator=generator).to(target.dtype)
        _repeat_into(target.view(-1), pool, zlib.crc32(name.encode()) % _DUMMY_POOL)


def _repeat_into(target: Tensor, pool: Tensor, start: int) -> None:
    """Fill ``target`` [n] with ``pool``, repeated, from ``start`` on."""
    filled = 0
    while filled < target.numel():
        piece = pool[start : start + target.numel() - filled]
        target[filled : filled + piece.numel()].copy_(piece)
        filled += piece.numel()
        start = 0
