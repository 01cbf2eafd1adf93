"""Where models come from: the variables that users of mirrors set."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from nanovllm.hub import resolve_model_path


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, False),
        ({"VLLM_USE_MODELSCOPE": "1"}, True),
        ({"VLLM_USE_MODELSCOPE": "True"}, True),
        ({"VLLM_USE_MODELSCOPE": "0"}, False),
        ({"NANOVLLM_USE_MODELSCOPE": "1"}, True),
        ({"NANOVLLM_USE_MODELSCOPE": "0", "VLLM_USE_MODELSCOPE": "1"}, False),  # our own variable decides
    ],
)
def test_a_variable_asks_for_modelscope(
    variables: dict[str, str], asked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[str] = []

    def hub(name: str) -> Any:
        def download(model: str, **options: Any) -> str:
            assert model == "owner/model" and "*.json" in options["allow_patterns"]
            found.append(name)
            return str(tmp_path)

        return types.SimpleNamespace(snapshot_download=download)

    for name in ("VLLM_USE_MODELSCOPE", "NANOVLLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", hub("modelscope"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub("huggingface"))
    assert resolve_model_path("owner/model") == tmp_path
    assert found == ["modelscope" if asked else "huggingface"]


class _Mirror(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_a_mirror_of_hugging_face_is_asked(tmp_path: Path) -> None:
    asked: list[str] = []
    handler = type("Mirror", (_Mirror,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        program = "from nanovllm.hub import resolve_model_path; resolve_model_path('owner/model')"
        variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        server.shutdown()
    assert done.returncode != 0 and "ModelError" in done.stderr
    assert any("owner/model" in path for path in asked), asked
