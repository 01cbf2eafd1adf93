"""Every call of torch_npu in the engine fits three versions of it; and the lint finds what does not."""

from __future__ import annotations

from pathlib import Path

import lint
import pytest
import schema

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = lint.Schemas()


def test_every_call_of_the_engine_fits() -> None:
    complaints, count = lint.lint(ROOT / "nanovllm", SCHEMAS)
    assert not complaints, "\n".join(complaints)
    assert count >= 12  # they are found at all


def test_operators_are_called_in_one_module() -> None:
    for file in (ROOT / "nanovllm").rglob("*.py"):
        if file.name != "npu_ops.py":
            assert not list(lint.calls(lint.ast.parse(file.read_text()))), file


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ("torch_npu.npu_rms_norm(x, w, epsilon=1e-6)", None),
        ("torch_npu.npu_rms_norm(x, w, eps=1e-6)", "no parameter 'eps'"),
        ("torch_npu.npu_rms_norm(x)", "gamma missing"),
        ("torch_npu.npu_rms_norm(x, w, 1e-6, True)", "at most 3"),
        ("torch_npu.npu_rms_norm(x, gamma=w, input=x)", "given twice"),
        ("torch_npu.npu_scatter_pa_kv_cache(k, v, kc, vc, s, 'Norm')", "at most 5"),
        ("torch_npu._npu_paged_attention(query=q)", "missing"),
        ("torch.ops.npu.npu_swiglu(x, dim=-1)", None),
        ("torch_npu.npu_no_such_thing(x)", "torch-npu 2.13.0 has no npu_no_such_thing"),
        ("torch_npu.npu_rms_norm(*arguments)", "cannot be checked"),
        ("torch_npu.npu_rms_norm(**arguments)", "cannot be checked"),
        ("torch.npu.mem_get_info()", None),
        ("torch.npu.memory_left()", "torch.npu has no memory_left"),
        # Newer than the oldest of the versions: the drift between them is seen.
        ("torch_npu.npu_moe_gating_top_k(x, 8, tid2eid=t)", "no parameter 'tid2eid' (torch-npu 2.10.0.post4)"),
    ],
)
def test_what_does_not_fit_is_found(call: str, complaint: str | None) -> None:
    found = [text for _, text in lint.findings(call, SCHEMAS)]
    if complaint is None:
        assert not found
    else:
        assert any(complaint in text for text in found), found


def test_schemas_are_read_with_their_defaults_and_keywords() -> None:
    read = lint.parameters("(Tensor x, int[2]? sizes=[1, 2], *,Tensor? workspace=None, Tensor(a!) out) -> ()")
    assert [(p.name, p.required, p.keyword_only) for p in read] == [
        ("x", True, False),
        ("sizes", False, False),
        ("workspace", False, True),
        ("out", True, True),
    ]


def test_schemas_are_found_in_a_library(tmp_path: Path) -> None:
    wrapper = (
        "N3c104impl6detail24WrapFunctionIntoFunctor_INS_26CompileTimeFunctionPointerIF{}EXadL_ZN3atb6_npu_xES7_EEEE"
    )
    for version, schema_of_x, signature in (("9.8.0", True, "vl"), ("9.9.0", False, "vl"), ("9.9.1", False, "vd")):
        strings = ["npu_y(Tensor x) -> Tensor", wrapper.format(signature)] + ["_npu_x(int k) -> ()"] * schema_of_x
        wheel = tmp_path / f"torch_npu-{version}-cp311-cp311-linux_x86_64.whl"
        with schema.zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("torch_npu/lib/libtorch_npu.so", b"\0".join(s.encode() for s in strings) + b"\0")
            archive.writestr("torch_npu/lib/libop_plugin_atb.so", b"")
    table = schema.collect(sorted(tmp_path.glob("*.whl")))
    assert table["npu_y"] == {"(Tensor x) -> Tensor": ["9.8.0", "9.9.0", "9.9.1"]}
    assert table["_npu_x"] == {"(int k) -> ()": ["9.8.0", "9.9.0"]}  # in 9.9.1 its type is another
