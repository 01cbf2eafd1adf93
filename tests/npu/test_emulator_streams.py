"""Streams and events: order, races that only a lazy schedule shows, waits that would never end, a cap."""

import pytest
import torch
from on_npu import DEVICE, npu, refused, torch_npu

eager = pytest.mark.emulated
lazy = pytest.mark.emulated(lazy=1)


@eager
def test_streams_are_ordered_by_events() -> None:
    side, done = torch.npu.Stream(), torch.npu.Event()
    x = npu(torch.zeros(8))
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        x.add_(1)
        done.record()
    done.wait()
    x.mul_(3)
    assert x.tolist() == [3.0] * 8


@eager
def test_an_event_tells_the_time_between() -> None:
    begin, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    begin.record()
    npu(torch.ones(64, 64)) @ npu(torch.ones(64, 64))
    end.record()
    end.synchronize()
    assert end.query()
    assert 0 < begin.elapsed_time(end) < 10_000


@lazy
def test_nothing_runs_before_somebody_waits() -> None:
    source = torch.full((4,), 1.0).pin_memory()
    there = source.to(DEVICE, non_blocking=True)
    source.fill_(7.0)  # the classic race: the copy has not happened yet
    assert there.tolist() == [7.0] * 4


@lazy
def test_a_host_buffer_may_be_reused_after_synchronising() -> None:
    source = torch.full((4,), 1.0).pin_memory()
    there = source.to(DEVICE, non_blocking=True)
    torch.npu.current_stream().synchronize()
    source.fill_(7.0)
    assert there.tolist() == [1.0] * 4


@lazy
def test_pageable_memory_is_staged() -> None:
    source = torch.full((4,), 1.0)
    there = source.to(DEVICE, non_blocking=True)
    source.fill_(7.0)
    assert there.tolist() == [1.0] * 4


def _two_streams(ordered: bool) -> list[float]:
    """Ten rounds of: one stream writes a number, another reads it. The answers the reader got."""
    writer, reader = torch.npu.Stream(), torch.npu.Stream()
    x, seen = npu(torch.zeros(1)), [npu(torch.zeros(1)) for _ in range(10)]
    torch.npu.synchronize()
    for number, target in enumerate(seen):
        if ordered:
            writer.wait_stream(reader)
        with torch.npu.stream(writer):
            x.fill_(number)
        if ordered:
            reader.wait_stream(writer)
        with torch.npu.stream(reader):
            target.copy_(x)
    torch.npu.synchronize()
    return [target.item() for target in seen]


@lazy
def test_a_missing_wait_between_streams_shows() -> None:
    assert _two_streams(ordered=True) == [float(n) for n in range(10)]
    assert _two_streams(ordered=False) != [float(n) for n in range(10)]


@eager
def test_luck_hides_a_missing_wait_from_the_eager_schedule() -> None:
    assert _two_streams(ordered=False) == [float(n) for n in range(10)]


@pytest.mark.parametrize("schedule", [pytest.param("eager", marks=eager), pytest.param("lazy", marks=lazy)])
def test_waiting_for_what_never_happens_is_an_error(schedule: str) -> None:
    event, stream, x = torch.npu.ExternalEvent(), torch.npu.Stream(), npu(torch.zeros(1))
    with torch.npu.stream(stream):
        event.wait(stream)
        x.add_(1)
    with refused("would DEADLOCK"):
        stream.synchronize()
    assert x.add_(5).item() == 5, "what waited is dropped, the device works on"


@pytest.mark.parametrize("schedule", [pytest.param("eager", marks=eager), pytest.param("lazy", marks=lazy)])
def test_an_external_event_may_be_waited_for_before_it_is_recorded(schedule: str) -> None:
    event, stream, x = torch.npu.ExternalEvent(), torch.npu.Stream(), npu(torch.zeros(1))
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        event.wait(stream)
        x.mul_(3)
    x.add_(1)
    event.record(torch.npu.current_stream())
    stream.synchronize()
    assert x.item() == 3


@eager
def test_an_error_on_the_device_names_operator_and_place() -> None:
    with refused(r"aclnnEmbedding: index 9 is out of range for 4 rows"):
        torch.nn.functional.embedding(npu(torch.tensor([1, 9])), npu(torch.zeros(4, 2)))
    assert npu(torch.ones(2)).sum().item() == 2


@lazy
def test_a_late_error_comes_with_the_next_synchronisation() -> None:
    torch.nn.functional.embedding(npu(torch.tensor([1, 9])), npu(torch.zeros(4, 2)))
    with refused(r"aclnnEmbedding: index 9"):
        torch.npu.synchronize()


@pytest.mark.emulated(streams=40)
def test_streams_run_out_with_the_real_error_code() -> None:
    import ctypes

    library, handles = ctypes.CDLL("libascendcl.so"), [ctypes.c_void_p() for _ in range(41)]
    codes = [library.aclrtCreateStreamWithConfig(ctypes.byref(handle), 0, 0) for handle in handles]
    assert codes[0] == 0
    assert codes[-1] == 207008
    for handle, code in zip(handles, codes, strict=True):
        if code == 0:
            library.aclrtDestroyStream(handle)
    assert torch_npu is not None
