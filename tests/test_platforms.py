"""What the CPU platform finds out about its machine, on machines made of files."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm.errors import ParameterError
from nanovllm.platforms import cpu, get_platform


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_cpu_is_the_default(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.platforms.cuda.visible_gpus", tuple)
    assert get_platform(device).device == "cpu"


@pytest.mark.parametrize("device", ["tpu", ""])
def test_a_device_without_a_platform_is_named(device: str) -> None:
    with pytest.raises(ParameterError, match="not available in this version") as caught:
        get_platform(device)
    assert (caught.value.parameter, caught.value.value) == ("device", device)


@pytest.mark.parametrize(
    ("asked", "checkpoint", "native", "kernels", "resolved"),
    [
        ("auto", "bfloat16", True, False, "bfloat16"),
        ("auto", "bfloat16", False, True, "bfloat16"),
        ("auto", "bfloat16", False, False, "float32"),
        ("auto", "float16", True, True, "bfloat16"),
        ("auto", "float16", False, True, "bfloat16"),
        ("auto", "float16", False, False, "float32"),
        ("auto", "float32", True, True, "float32"),
        ("auto", None, True, True, "float32"),
        ("bfloat16", "float32", False, False, "bfloat16"),
        ("float16", "bfloat16", True, True, "float16"),
    ],
)
def test_dtype(
    asked: str,
    checkpoint: str | None,
    native: bool,
    kernels: bool,
    resolved: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "has_native_bfloat16", lambda: native)
    monkeypatch.setattr(cpu, "_has_vector_kernels", lambda: kernels)
    assert get_platform("cpu").resolve_dtype(asked, checkpoint) == resolved


def test_vector_kernels_count_where_they_are_built_and_the_cpu_has_their_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_KERNELS", tmp_path)
    assert not cpu._has_vector_kernels()
    (tmp_path / "kernels_generic.so").touch()
    assert not cpu._has_vector_kernels()
    (tmp_path / "kernels_avx2.so").touch()
    assert cpu._has_vector_kernels() is ("avx2" in Path("/proc/cpuinfo").read_text().split())
    monkeypatch.setattr(cpu, "_VECTORS", {"avx2": {"an instruction that no CPU has"}})
    assert not cpu._has_vector_kernels()


def test_native_bfloat16_is_what_torch_finds() -> None:
    if not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        pytest.skip("this torch does not say")
    x86 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if "bf16" in Path("/proc/cpuinfo").read_text() or x86:
        assert cpu.has_native_bfloat16()
    else:
        assert not cpu.has_native_bfloat16()


def limit(folder: Path, most: str, used: int, cache: int, version: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(most + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cache}\n{prefix}active_file 0\n")
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_what_the_tightest_container_leaves(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = cpu._meminfo("MemAvailable") or 0
    loose = limit(tmp_path / "loose", str(2**62), 10, 0, version)
    tight = limit(tmp_path / "tight", "5000", 3000, 1000, version)  # 1,000 of the 3,000 are page cache
    none = tmp_path / "none"
    monkeypatch.setattr(cpu, "_cgroup_folders", lambda: [loose, none])
    assert get_platform("cpu").available_memory() == pytest.approx(free, rel=0.1)
    monkeypatch.setattr(cpu, "_cgroup_folders", lambda: [loose, tight, none])
    assert get_platform("cpu").available_memory() == 3000
    limit(tmp_path / "tight", "2000", 4000, 0, version)
    assert get_platform("cpu").available_memory() == 0


def test_an_unlimited_control_group_is_no_limit(tmp_path: Path) -> None:
    assert cpu._cgroup_memory_left(limit(tmp_path, "max", 3000, 0)) is None


def test_threads_stay_within_the_quota_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(cpu, "_cgroup_folders", lambda: [tmp_path])
    assert cpu.usable_cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu.usable_cores() >= 1


def test_omp_num_threads_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(cpu, "usable_cores", lambda: 7)
        assert get_platform("cpu").set_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert get_platform("cpu").set_threads() == 7
    finally:
        torch.set_num_threads(before)


def test_a_few_rows_of_logits_are_sampled_by_one_thread() -> None:
    platform, before = get_platform("cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for logits, threads in ((151_936, 1), (32 * 151_936, 3)):
            with platform.sampling(logits):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), platform.sampling(1):
            1 / 0  # noqa: B018
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_memory_of_this_process_grows_with_it() -> None:
    before = get_platform("cpu").memory_used_by_process()
    with mmap.mmap(-1, 64 << 20) as block:  # not what an allocator may still have
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert get_platform("cpu").memory_used_by_process() - before > 50 << 20


def test_asking_about_the_platform_does_not_import_torch() -> None:
    code = (
        "import sys; from nanovllm.platforms import get_platform; p = get_platform('auto');"
        "p.resolve_dtype('auto', 'bfloat16'), p.available_memory(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
