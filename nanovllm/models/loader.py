"""Checkpoint files -> parameters.

Each tensor is read from its memory-mapped file straight into its place, already fused and split: beside the model there
is never more than one tensor in memory. A checkpoint must fit the model exactly: missing, unexpected and misshapen
tensors are errors.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nanovllm.errors import ModelError
from nanovllm.layers.weights import Slots, WeightSlot
from nanovllm.models.decoder import Decoder

_PROGRESS_BYTES = 4 << 30  # a load below this takes a second or two: no progress bar
_MAPPED_BYTES = 64 << 20  # pages of a mapped file count as the process's memory until it is closed
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
        load_safetensors(model.slots(), checkpoint_files(Path(path)), _tied_head(model), model.filled)
    model.finish()


def _tied_head(model: Decoder) -> str | None:
    """The name under which a checkpoint may repeat the embedding as the output head."""
    return f"{model.spec.names.head}.weight" if model.spec.tied else None


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or ``model.safetensors``, or all there are."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index ({error!r}); download it again") from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(f"{path} lacks {_some(missing, 'files')}, which {index.name} lists; complete the download")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{path} holds no *.safetensors weights; convert the checkpoint to safetensors, "
            "or try the engine without weights with load_format='dummy'"
        )
    return files


def load_safetensors(
    slots: Slots, files: list[Path], tied_head: str | None = None, filled: Callable[[str], None] | None = None
) -> None:
    """Fill every slot from ``files``, and tell ``filled`` the name of each; ``slots`` is emptied on the way.

    ``tied_head`` is the name of a tensor that may be there and is not needed.
    """
    missing = set(slots)
    unexpected: list[str] = []
    total = sum(file.stat().st_size for file in files)
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, disable=total < _PROGRESS_BYTES
    ) as progress:
        for file in files:
            wanted: list[tuple[str, str]] = []  # tensor, slot
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    place = name if name in slots else f"model.{name}"  # a decoder saved alone lacks the prefix
                    if place in slots:
                        wanted.append((name, place))
                        missing.discard(place)
                    elif name != tied_head and not name.endswith(".rotary_emb.inv_freq"):
                        unexpected.append(name)
            wanted.sort(key=lambda pair: slots[pair[1]].target.nbytes)  # the largest is mapped while others are not yet
            while wanted:
                with _open(file) as tensors:
                    read = 0
                    while wanted and read < _MAPPED_BYTES:
                        name, place = wanted.pop()
                        read += _copy(tensors, name, slots.pop(place), file)
                        if filled is not None:
                            filled(place)
                progress.update(read)
    problems = []
    if missing:
        problems.append(f"missing {_some(sorted(missing))}")
    if unexpected:
        problems.append(f"unexpected {_some(sorted(unexpected))}")
    if problems:
        raise ModelError(
            f"the weights in {files[0].parent} do not fit the model of its config.json: " + "; ".join(problems)
        )


def _open(file: Path):  # type: ignore[no-untyped-def]  # a safe_open
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ModelError(f"{file} is damaged or incomplete ({size} bytes: {error}); download it again") from error


def _copy(tensors: safe_open, name: str, slot: WeightSlot, file: Path) -> int:
    """Copy a checkpoint tensor, or this rank's slice of it, into its slot; returns the bytes copied."""
    source = tensors.get_slice(name)
    shape = tuple(source.get_shape())
    if shape != slot.shape:
        raise ModelError(f"{name} in {file} has shape {list(shape)}, the model of config.json needs {list(slot.shape)}")
    if slot.whole:
        value = tensors.get_tensor(name)
    elif slot.dim == 0:
        value = source[slot.start : slot.start + slot.target.shape[0]]
    else:
        value = source[:, slot.start : slot.start + slot.target.shape[1]]
    slot.target.copy_(value)
    return value.numel() * value.element_size()


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


def _some(names: Iterable[str], what: str = "tensors", most: int = 8) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{len(listed)} {what}: " + ", ".join(listed[:most]) + more
