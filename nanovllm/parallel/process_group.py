"""The process group of a model's ranks: they find each other, and can compute together.

Ranks meet at a store that rank 0 opens, on this host unless the user says otherwise, and reachable from nowhere else.
Then torch.distributed's backend for the device takes over: HCCL between NPUs, NCCL between GPUs, Gloo between CPUs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanovllm.errors import ParameterError
from nanovllm.parallel.context import ParallelContext

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_HCCL_NUMBERS = {  # variable -> least and largest value by HCCL's documentation
    "HCCL_CONNECT_TIMEOUT": (120, 7200),
    "HCCL_EXEC_TIMEOUT": (0, 2147483647),
    "HCCL_BUFFSIZE": (1, 2147483647),
}


@dataclass(frozen=True)
class MeetingPoint:
    """Where the ranks meet.

    Attributes:
        address, port: of rank 0's store.
        patience: seconds that a rank waits there for the others.
    """

    address: str = "127.0.0.1"
    port: int = 29501
    patience: int = 120

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> MeetingPoint:
        """``MASTER_ADDR`` and ``MASTER_PORT`` as torchrun and vLLM have them, ``HCCL_CONNECT_TIMEOUT`` as HCCL has it.

        Raises:
            ParameterError: one of them, or another number that HCCL reads, is none.
        """
        for name, (least, most) in _HCCL_NUMBERS.items():
            _number(variables, name, least, least, most)
        return cls(
            variables.get("MASTER_ADDR") or cls.address,
            _number(variables, "MASTER_PORT", cls.port, 1, 65535),
            _number(variables, "HCCL_CONNECT_TIMEOUT", cls.patience, *_HCCL_NUMBERS["HCCL_CONNECT_TIMEOUT"]),
        )


@contextmanager
def process_group(device: str, rank: int, world: int, where: MeetingPoint | None = None) -> Iterator[ParallelContext]:
    """Rank ``rank`` of ``world``, on the device of that number: its group exists in the block, and is gone behind it.

    Every rank calls this in a process of its own. The ranks add up a number before the block begins, so that what keeps
    them apart is found here and not in the first step.

    Args:
        device: "cpu", "cuda" or "npu"; torch must know it already (``Platform.load``).
        where: where they meet; by default what the environment says.

    Raises:
        ParameterError: a rank or a variable that cannot be, too few devices, a port in use.
        TimeoutError: the other ranks did not come.
        RuntimeError: they came, but the backend cannot connect them, or this process has a group already.
    """
    if device not in BACKENDS:
        raise ParameterError(f"no collectives for this device; choose one of {', '.join(BACKENDS)}", "device", device)
    if world < 1 or not 0 <= rank < world:
        raise ParameterError(f"a rank of {world} is in 0 .. {world - 1}", "rank", rank)
    if dist.is_initialized():
        raise RuntimeError("this process has a process group already; one model's ranks are one process each")
    where = where or MeetingPoint.from_environment()
    _take_device(device, rank, world)
    store = _meet(where, rank, world)
    dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=world)
    try:
        context = ParallelContext(rank, world)
        _add_up(device, context)
        yield context
    finally:
        dist.destroy_process_group()


def _take_device(device: str, rank: int, world: int) -> None:
    """Make device ``rank`` the current one: HCCL and NCCL bind a rank to what is current when its group begins."""
    if device == "cpu":
        return
    module: Any = torch.get_device_module(device)
    if module.device_count() < world:
        variable = "ASCEND_RT_VISIBLE_DEVICES" if device == "npu" else "CUDA_VISIBLE_DEVICES"
        raise ParameterError(
            f"{world} ranks need {world} devices, {module.device_count()} are visible ({variable} is "
            f"{os.environ.get(variable, 'not set')!r})",
            "tensor_parallel_size",
            world,
        )
    module.set_device(rank)


def _meet(where: MeetingPoint, rank: int, world: int) -> dist.TCPStore:
    """The store. Rank 0 hands it a socket, for by itself it would listen on every interface of the host."""
    listener = _listen(where) if rank == 0 else None
    try:
        return dist.TCPStore(
            where.address,
            where.port,
            world,
            is_master=rank == 0,
            timeout=timedelta(seconds=where.patience),
            master_listen_fd=None if listener is None else listener.detach(),
            use_libuv=False,  # torch's other store does not take a socket in every version
        )
    except dist.DistError as error:
        raise TimeoutError(
            f"rank {rank} of {world} has waited {where.patience} s at {where.address}:{where.port}, and not all ranks "
            "came. Are they running, with the same MASTER_ADDR and MASTER_PORT?"
        ) from error


def _listen(where: MeetingPoint) -> socket.socket:
    try:
        return socket.create_server((where.address, where.port))
    except OSError as error:
        raise ParameterError(
            f"rank 0 cannot listen on {where.address}:{where.port} ({error.strerror}); choose another (MASTER_ADDR, "
            "MASTER_PORT)",
            "MASTER_PORT",
            where.port,
        ) from error


def _add_up(device: str, context: ParallelContext) -> None:
    try:
        total = context.all_reduce(torch.ones(1, device=device)).item()
    except RuntimeError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = " (HCCL_IF_IP and HCCL_SOCKET_IFNAME choose its network)" if device == "npu" else ""
        raise RuntimeError(
            f"rank {context.rank} of {context.world}: {BACKENDS[device]} cannot connect the ranks{hint}: {first}"
        ) from error
    if total != context.world:
        raise RuntimeError(f"rank {context.rank}: the sum of {context.world} ones over the ranks is {total}")


def _number(variables: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = variables.get(name)
    if not text:
        return default
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise ParameterError(f"must be a whole number from {least} to {most}", name, text)
    return int(text)
