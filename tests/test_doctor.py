"""``nanovllm doctor`` on machines that are made up: Ascend installations in folders, drivers, torch builds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.entrypoints.cli import doctor
from nanovllm.entrypoints.cli.collect_env import collect
from nanovllm.entrypoints.cli.main import main
from nanovllm.entrypoints.doctor import ascend, ascend_versions, gpu, host, npu, probes
from nanovllm.entrypoints.doctor.findings import Finding

ROOT = Path(__file__).resolve().parents[1]
SMI = """
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.1                   Version: 25.5.1                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     {name: <20}| {health: <14}| 87.8        31                0    / 0             |
| 0                         | 0000:52:00.0  | 0           0    / 0          3406 / 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 4711          | python                   | 812                     |
+===========================+===============+====================================================+
"""
# As much of torch as the questions need, so that asking takes no second.
TORCH = """
from types import SimpleNamespace
__version__ = "{version}"
npu = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda i: "Ascend910B3")
"""


class Installation:
    """An Ascend installation below ``folder``, complete and right unless told otherwise."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.site = folder / "site"
        monkeypatch.setattr(ascend, "ROOT", folder)
        monkeypatch.syspath_prepend(str(self.site))
        monkeypatch.setenv("PYTHONPATH", f"{self.site}{os.pathsep}{ROOT}")
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        for name in [*ascend.VARIABLES, "ASCEND_TOOLKIT_HOME"]:
            monkeypatch.delenv(name, raising=False)
        for name in ("davinci0", "davinci1", *ascend.DEVICE_SERVICES):
            self.write(f"dev/{name}")
        self.toolkit, self.driver, self.smi = self.toolkit_of("9.2.0"), self.driver_of("26.0.RC1"), self.smi_of("910B3")
        monkeypatch.setenv("ASCEND_HOME_PATH", str(self.toolkit))
        self.torch_npu("2.13.0", "__version__ = '2.13.0'")
        self.write("site/torch/__init__.py", TORCH.format(version="2.13.0+cpu"))

    def write(self, name: str, text: str = "") -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def toolkit_of(self, version: str) -> Path:
        self.write("usr/local/Ascend/ascend-toolkit/set_env.sh")
        home = "usr/local/Ascend/ascend-toolkit/latest"
        return self.write(
            f"{home}/aarch64-linux/ascend_toolkit_install.info", f"arch=aarch64\nversion={version}\n"
        ).parents[1]

    def driver_of(self, version: str) -> Path:
        self.write("etc/ascend_install.info", "UserName=HwHiAiUser\nDriver_Install_Path_Param=/usr/local/Ascend\n")
        return self.write("usr/local/Ascend/driver/version.info", f"Version={version}\nascendhal_version=7.35.23\n")

    def smi_of(self, name: str, health: str = "OK") -> Path:
        return self.program(f"cat <<'END'\n{SMI.format(name=name, health=health)}END")

    def program(self, text: str) -> Path:
        file = self.write("bin/npu-smi", f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
        return file

    def torch_npu(self, version: str, code: str) -> None:
        shutil.rmtree(self.site, ignore_errors=True)
        self.write("site/torch_npu/__init__.py", code)
        info = f"site/torch_npu-{version}.dist-info"
        self.write(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
        self.write(f"{info}/entry_points.txt", "[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
        self.write("site/torch/__init__.py", TORCH.format(version="2.13.0+cpu"))

    def findings(self, torch_version: str = "2.13.0+cpu") -> list[Finding]:
        return list(npu.check_npu(True, torch_version))


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    return Installation(tmp_path, monkeypatch)


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.subject, finding.level) for finding in findings if finding.level != "ok"]


def only(findings: list[Finding], subject: str) -> Finding:
    (found,) = [finding for finding in findings if finding.subject == subject]
    return found


# -- Ascend ------------------------------------------------------------------------------------------------------------


def test_a_right_installation_has_no_findings_but_good_ones(installation: Installation):
    findings = installation.findings()
    assert bad(findings) == []
    assert only(findings, "CANN").what == "9.2.0" and only(findings, "driver").what == "Ascend HDK 26.0.RC1"
    assert only(findings, "npu-smi").what == "NPU 0: 910B3"
    assert only(findings, "import torch_npu").what == "Ascend910B3, Ascend910B3"
    assert f"ASCEND_HOME_PATH={installation.toolkit}" in only(findings, "environment").what


def test_no_ascend_is_a_problem_only_for_who_wants_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ascend, "ROOT", tmp_path)
    monkeypatch.setattr(ascend, "torch_npu_version", lambda: None)
    monkeypatch.setattr(ascend, "npu_smi", lambda: (None, []))
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert [finding.level for finding in npu.check_npu(False, "2.13.0")] == ["ok"]
    assert [finding.level for finding in npu.check_npu(True, "2.13.0")] == ["problem"]


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("raise ImportError('no backend')", "failed with exit code 1: ImportError: no backend"),
        ("raise OSError('libtorch_npu.so: file too short')", "OSError: libtorch_npu.so: file too short"),
        ("import os; os.abort()", "was killed by SIGABRT"),
        ("import os; os._exit(0)", "answered with something else"),
    ],
)
def test_a_torch_npu_that_cannot_be_loaded_is_described(installation: Installation, code: str, what: str):
    installation.torch_npu("2.13.0", code)
    finding = only(installation.findings(), "import torch_npu")
    assert finding.level == "problem" and what in finding.what and finding.remedy


def test_a_missing_library_is_named_with_the_script_that_finds_it(installation: Installation):
    message = "raise ImportError('{}: cannot open shared object file: No such file or directory')"
    installation.torch_npu("2.13.0", message.format("libhccl.so"))
    finding = only(installation.findings(), "import torch_npu")
    script = installation.folder / "usr/local/Ascend/ascend-toolkit/set_env.sh"
    assert (finding.level, finding.what, finding.remedy) == ("problem", "libhccl.so: not found", f"source {script}")
    installation.torch_npu("2.13.0", message.format("libatb.so"))
    finding = only(installation.findings(), "import torch_npu")
    assert finding.what == "libatb.so: not found" and finding.remedy.startswith("install NNAL")
    installation.torch_npu("2.13.0", message.format("libascend_hal.so"))
    assert "driver/lib64" in only(installation.findings(), "import torch_npu").remedy


@pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("ldd") is None, reason="needs gcc and ldd")
def test_every_missing_library_is_named_not_the_first_alone(installation: Installation):
    """The loader stops at the first; the others are asked of the files."""
    installation.torch_npu("2.13.0", "raise ImportError('libhccl.so: cannot open shared object file: No such file')")
    folder = installation.folder / "site/torch_npu/lib"
    folder.mkdir()
    source = installation.write("empty.c")
    for name in ("hccl", "ascendcl", "own"):
        subprocess.run(["gcc", "-shared", "-o", folder / f"lib{name}.so", source], check=True)
    needed = ["-Wl,--no-as-needed", f"-L{folder}", "-lhccl", "-lascendcl", "-lown"]
    subprocess.run(["gcc", "-shared", "-o", folder / "libtorch_npu.so", source, *needed], check=True)
    for name in ("hccl", "ascendcl"):
        (folder / f"lib{name}.so").unlink()
    found = [finding.what for finding in installation.findings() if finding.subject == "import torch_npu"]
    assert found == ["libhccl.so, libascendcl.so: not found"]  # one remedy for both
    assert collect()["NPU"]["missing libraries"] == ["libhccl.so", "libascendcl.so"]


def test_a_torch_npu_for_another_torch_is_a_problem_with_both_ways_out(installation: Installation):
    finding = only(installation.findings("2.12.0+cpu"), "torch-npu")
    assert finding.level == "problem" and "torch-npu 2.13.0 is for torch 2.13.0" in finding.what
    assert "torch==2.13.0" in finding.remedy and "torch-npu==2.12.0.post3" in finding.remedy


@pytest.mark.parametrize(
    ("package", "torch", "cann", "level"),
    [
        ("2.13.0", "2.13.0", "9.2.0", "ok"),
        ("2.13.0", "2.13.0", "9.1.0-beta.1", "ok"),
        ("2.13.0", "2.13.0", "8.3.RC1", "problem"),
        ("2.13.0", "2.13.0", "10.0.0", "warning"),
        ("2.12.0.post2", "2.12.0", "9.1.1", "ok"),
        ("2.8.0", "2.8.0", "9.0.0", "warning"),
        ("2.13.0.post9", "2.13.0", "9.2.0", "warning"),
    ],
)
def test_torch_npu_and_cann(installation: Installation, package: str, torch: str, cann: str, level: str):
    found = [each for each in npu.check_versions(package, torch, cann, "26.0.RC1") if each.subject == "torch-npu"]
    assert [each.level for each in found] == [level]
    assert (found[0].remedy == "") == (level == "ok")


@pytest.mark.parametrize(
    ("cann", "driver", "level"),
    [("9.1.0", "25.5.1", "ok"), ("9.1.0", "25.2.0", "problem"), ("9.2.0", "25.2.0", "ok"), ("9.1.0", None, "warning"),
     ("7.0.0", "23.0.1", "ok")],
)  # fmt: skip
def test_cann_and_driver(installation: Installation, cann: str, driver: str | None, level: str):
    assert only(list(npu.check_versions("2.13.0", "2.13.0", cann, driver)), "driver").level == level


def test_versions_are_read_wherever_they_stand(installation: Installation, monkeypatch: pytest.MonkeyPatch):
    assert ascend.driver_version() == "26.0.RC1" and ascend.cann_version() == "9.2.0"
    installation.driver.unlink()
    assert ascend.driver_version() is None
    old = installation.write("old/version.cfg", "# version\ntoolkit_installed_version=[7.0.0:8.3.RC1]\n").parent
    monkeypatch.setenv("ASCEND_HOME_PATH", str(old))
    assert ascend.cann_version() == "8.3.RC1"
    new = installation.write("cann-9.1.0/set_env.sh").parent
    monkeypatch.setenv("ASCEND_HOME_PATH", str(new))
    assert ascend.cann_version() == "9.1.0" and ascend.set_env_script() == (str(new / "set_env.sh"), True)


def test_without_a_toolkit_its_installation_is_advised(installation: Installation, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(installation.folder / "usr/local/Ascend/ascend-toolkit")
    monkeypatch.delenv("ASCEND_HOME_PATH")
    finding = only(installation.findings(), "CANN")
    assert finding.level == "problem" and "install CANN" in finding.remedy and "set_env.sh" in finding.remedy


@pytest.mark.parametrize("name", ascend.DEVICE_SERVICES)
def test_a_container_without_a_device_file_is_told_of_docker(installation: Installation, name: str):
    (installation.folder / "dev" / name).unlink()
    finding = only(installation.findings(), "NPU")
    assert finding.level == "problem" and name in finding.what and f"--device /dev/{name}" in finding.remedy


def test_npu_smi_tells_health_and_kind(installation: Installation):
    installation.smi_of("910B3", "Alarm")
    finding = only(installation.findings(), "npu-smi")
    assert (finding.level, finding.what) == ("problem", "NPU 0 (910B3): Alarm")
    installation.smi_of("310P3")
    finding = only(installation.findings(), "310P")
    assert "--dtype float16" in finding.what and "--enforce-eager" in finding.what
    installation.program("echo 'dcmi module initialize failed. ret is -8005' >&2; exit 1")
    finding = only(installation.findings(), "npu-smi")
    assert finding.level == "problem" and "dcmi module initialize failed" in finding.what


@pytest.mark.parametrize(
    ("name", "value", "level", "part"),
    [
        ("ASCEND_RT_VISIBLE_DEVICES", "0,1", None, ""),
        ("ASCEND_RT_VISIBLE_DEVICES", "0,2", "problem", "there is no NPU 2"),
        ("ASCEND_RT_VISIBLE_DEVICES", "0,0", "problem", "names an NPU twice"),
        ("ASCEND_RT_VISIBLE_DEVICES", "npu:0", "problem", "no list of numbers"),
        ("ASCEND_RT_VISIBLE_DEVICES", "", "problem", "no list of numbers"),
        ("ASCEND_HOME_PATH", "/no/such/folder", "problem", "no such folder"),
        ("TASK_QUEUE_ENABLE", "2", "warning", "graphs"),
        ("TASK_QUEUE_ENABLE", "1", None, ""),
        ("ASCEND_LAUNCH_BLOCKING", "1", "warning", "waits"),
        ("NANOVLLM_ASCEND_FUSED", "1", "warning", "needs triton-ascend"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", None, ""),
        ("PYTORCH_NPU_ALLOC_CONF", "pin_memory_expandable_segments:True", "warning", "graphs"),
    ],
)
def test_environment_variables(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, name: str, value: str, level: str | None, part: str
):
    monkeypatch.setenv(name, value)
    found = [each for each in npu.check_variables(2) if each.level != "ok"]
    assert [(each.subject, each.level) for each in found] == ([] if level is None else [(name, level)])
    assert all(part in each.what and each.remedy for each in found)


def test_a_toolkit_that_is_not_sourced_is_noticed(installation: Installation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ASCEND_HOME_PATH")
    finding = only(list(npu.check_variables(2)), "ASCEND_HOME_PATH")
    assert finding.level == "warning" and finding.remedy.startswith("source ") and "set_env.sh" in finding.remedy


def test_the_table_of_versions_is_consistent():
    packages = [package for release in ascend_versions.RELEASES for package in release.packages]
    assert len(set(packages)) == len(packages)
    for release in ascend_versions.RELEASES:
        assert ascend_versions.series(release.cann) in release.works_with
        assert list(release.works_with) == sorted(release.works_with)
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None and ascend_versions.numbers(oldest[1]) == ascend_versions.OLDEST_TORCH
    recommended = re.search(r"torch-npu==(\S+)", ascend_versions.INSTALL)
    assert recommended is not None and ascend_versions.release_of(recommended[1]) == ascend_versions.RELEASES[0]


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("8.3.RC1", (8, 3)), ("2.13.0+cpu", (2, 13, 0)), ("2.12.0.post3", (2, 12, 0)), ("2.15.0a0+git1", (2, 15)),
     ("9.2.0-beta.2", (9, 2, 0)), ("unknown", ())],
)  # fmt: skip
def test_numbers_of_versions(version: str, numbers: tuple[int, ...]):
    assert ascend_versions.numbers(version) == numbers


# -- torch and the machine ---------------------------------------------------------------------------------------------


def test_a_broken_plug_in_that_breaks_torch_is_found_and_the_variable_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the real torch, which loads whatever is installed as a plug-in."""
    installation = Installation(tmp_path, monkeypatch)
    installation.torch_npu("2.13.0", "raise ImportError('libhccl.so: cannot open shared object file')")
    shutil.rmtree(installation.site / "torch")
    torch = probes.Answer({"version": "2.13.0"})
    finding = only(list(host.check_torch(torch)), "import torch")
    assert finding.level == "warning" and "torch_npu" in finding.what and "libhccl.so: not found" in finding.what
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in finding.remedy
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert bad(list(host.check_torch(torch))) == []


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (probes.Answer(None, "failed with exit code 1: ModuleNotFoundError: No module named 'torch'"), "not installed"),
        (probes.Answer(None, "was killed by SIGILL: no message"), "was killed by SIGILL"),
        (probes.Answer({"version": "2.8.0+cpu"}), "2.8.0+cpu is older than 2.11"),
    ],
)
def test_a_torch_that_is_missing_broken_or_old(answer: probes.Answer, part: str):
    (finding,) = host.check_torch(answer)
    assert finding.level == "problem" and part in finding.what and "pip install" in finding.remedy


def test_kernels_that_are_not_built_are_a_warning_with_the_command(monkeypatch: pytest.MonkeyPatch):
    value = {"instruction set": None, "threads": 2, "cores": 2}
    monkeypatch.setattr(probes, "ask", lambda code: probes.Answer(value))
    kernels, threads = host.check_kernels()
    assert kernels.level == "warning" and "python -m nanovllm.ops.cpu.build" in kernels.remedy and threads.level == "ok"


@pytest.mark.parametrize(
    ("threads", "cores", "asked", "level"),
    [(8, 8, None, "ok"), (16, 8, "16", "warning"), (1, 8, "1", "warning"), (8, 8, "8", "ok"), (2, 8, None, "ok")],
)
def test_threads(threads: int, cores: int, asked: str | None, level: str):
    (finding,) = host.check_threads(threads, cores, asked)
    assert finding.level == level


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanovllm.platforms.CpuPlatform.available_memory", lambda self: 2**30)
    assert [finding.level for finding in host.check_memory()] == ["warning"]


# -- NVIDIA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """What is found on a machine with such GPUs, driver and torch."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)

    def examine(
        *gpus: tuple[str, list[int]],
        driver: Any = (13, 0),
        build: str | None = "13.0",
        sees: bool = True,
        wanted: bool = False,
    ) -> list[Finding]:
        value = {"GPUs": gpus, "driver's CUDA": driver, "torch has CUDA": build is not None}
        monkeypatch.setattr(probes, "ask", lambda code: probes.Answer(value))
        return list(gpu.check_gpu(wanted, {"CUDA build": build, "CUDA devices": ["H100"] if sees else []}))

    return examine


def test_gpus(nvidia: Callable[..., list[Finding]], tmp_path: Path):
    hopper, turing = ("H100", [9, 0]), ("T4", [7, 5])
    assert bad(nvidia(hopper)) == []
    assert bad(nvidia(hopper, build="12.8")) == []
    assert bad(nvidia(hopper, driver=(12, 4), build="12.8")) == []  # minor versions of a CUDA go together
    assert bad(nvidia(turing)) == [("GPU kernels", "warning")]
    assert bad(nvidia(hopper, build=None)) == [("torch and CUDA", "warning")]
    assert bad(nvidia(hopper, sees=False)) == [("torch and CUDA", "problem")]
    old_driver = nvidia(hopper, driver=(12, 8))
    assert bad(old_driver) == [("torch and CUDA", "problem")]
    assert "newer driver" in only(old_driver, "torch and CUDA").remedy
    assert bad(nvidia()) == [] and bad(nvidia(wanted=True)) == [("NVIDIA", "problem")]
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version")
    assert bad(nvidia()) == [("NVIDIA", "problem")]


def test_the_version_a_driver_tells_is_taken_apart(monkeypatch: pytest.MonkeyPatch):
    from nanovllm.platforms import cuda_driver

    def tell(pointer: Any) -> int:
        pointer._obj.value = 12080
        return 0

    monkeypatch.setattr(cuda_driver, "_load_driver", lambda: SimpleNamespace(cuDriverGetVersion=tell))
    assert cuda_driver.driver_cuda_version() == (12, 8)
    monkeypatch.setattr(cuda_driver, "_load_driver", lambda: None)
    assert cuda_driver.driver_cuda_version() is None


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_exit_code_and_json_tell_of_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    findings = [Finding("torch", "ok", "2.13.0"), Finding("memory", "warning", "little", "buy some")]
    monkeypatch.setattr(doctor, "examine", lambda device: iter(findings))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "0 problem(s), 1 warning(s)" in out and "-> buy some" in out
    findings.append(Finding("CANN", "problem", "not found", "install it"))
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["problems"], report["warnings"]) == (1, 1)
    assert report["findings"][-1] == {
        "subject": "CANN",
        "level": "problem",
        "what": "not found",
        "remedy": "install it",
    }


def test_the_command_loads_neither_torch_nor_a_plug_in_into_its_process(tmp_path: Path):
    """A torch_npu that kills whoever imports it: the command lives to tell."""
    for name, code in (("torch_npu", "import os; os.abort()"), ("torch", TORCH.format(version="2.13.0"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    code = "import sys; from nanovllm.entrypoints.cli.main import main; code = main(['doctor', '--json']); " \
           "assert not {'torch', 'torch_npu'} & set(sys.modules); sys.exit(code)"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stderr == ""
    findings = json.loads(done.stdout)["findings"]
    assert any(each["subject"] == "import torch_npu" and "SIGABRT" in each["what"] for each in findings)
    assert all(bool(each["remedy"]) == (each["level"] != "ok") for each in findings)
