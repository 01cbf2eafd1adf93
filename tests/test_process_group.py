"""The process group of a model's ranks, over Gloo; over HCCL in ``npu/test_emulator_ranks.py``."""

from __future__ import annotations

import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.errors import ParameterError
from nanovllm.parallel.process_group import MeetingPoint, process_group


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, world: int, port: int, results: Any) -> None:
    with process_group("cpu", rank, world, MeetingPoint(port=port)) as context:
        listening = _listeners(port) if rank == 0 else []
        summed = context.all_reduce(torch.tensor([rank + 1.0])).tolist()
        gathered = context.all_gather(torch.tensor([float(rank)])).tolist()
    results.put((rank, summed, gathered, listening, torch.distributed.is_initialized()))


def _listeners(port: int) -> list[str]:
    """The addresses on which this host listens at ``port``, as the kernel writes them."""
    found = []
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(name).read_text().splitlines()[1:]:
            fields = line.split()
            address, own = fields[1].rsplit(":", 1)
            if fields[3] == "0A" and int(own, 16) == port:
                found.append(address)
    return found


def test_ranks_meet_on_this_host_alone_and_part() -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, 2, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = sorted(results.get(timeout=100) for _ in processes)
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    for rank, (number, summed, gathered, listening, left_over) in enumerate(found):
        assert (number, summed, gathered, left_over) == (rank, [3.0], [0.0, 1.0], False)
        assert listening == (["0100007F"] if rank == 0 else [])  # 127.0.0.1, and no other


def test_one_rank_is_a_group_and_can_be_one_again() -> None:
    for _ in range(2):
        with process_group("cpu", 0, 1, MeetingPoint(port=free_port())) as context:
            assert context.world == 1 and torch.distributed.get_world_size() == 1
            with pytest.raises(RuntimeError, match="a process group already"), process_group("cpu", 0, 1):
                pass
        assert not torch.distributed.is_initialized()


def test_a_rank_that_stays_alone_says_so() -> None:
    started = time.monotonic()
    with (
        pytest.raises(TimeoutError, match=r"waited 1 s at 127.0.0.1:.*not all ranks came"),
        process_group("cpu", 0, 2, MeetingPoint(port=free_port(), patience=1)),
    ):
        pass
    assert time.monotonic() - started < 30 and not torch.distributed.is_initialized()


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = pytest.raises(ParameterError, match=f"cannot listen on 127.0.0.1:{port}.*MASTER_PORT")
        with refused, process_group("cpu", 0, 2, MeetingPoint(port=port)):
            pass


def test_the_environment_says_where() -> None:
    assert MeetingPoint.from_environment({}) == MeetingPoint("127.0.0.1", 29501, 120)
    variables = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000", "HCCL_CONNECT_TIMEOUT": "600"}
    assert MeetingPoint.from_environment(variables) == MeetingPoint("10.0.0.1", 4000, 600)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "http"),
        ("HCCL_CONNECT_TIMEOUT", "60"),
        ("HCCL_EXEC_TIMEOUT", "-1"),
        ("HCCL_BUFFSIZE", "200MB"),
    ],
)
def test_a_variable_that_is_no_such_number_is_refused(name: str, value: str) -> None:
    with pytest.raises(ParameterError, match="whole number") as error:
        MeetingPoint.from_environment({name: value})
    assert error.value.parameter == name and error.value.value == value


@pytest.mark.parametrize(("device", "rank", "world"), [("tpu", 0, 1), ("cpu", 2, 2), ("cpu", -1, 2), ("cpu", 0, 0)])
def test_what_is_no_rank_is_refused(device: str, rank: int, world: int) -> None:
    with pytest.raises(ParameterError), process_group(device, rank, world):
        pass
