"""What a user may set about the server itself; what concerns the engine is in `EngineArgs`. Names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nanovllm.entrypoints.serve.otlp import check_endpoint
from nanovllm.entrypoints.serve.tenants import read_tenants
from nanovllm.errors import ParameterError
from nanovllm.parsers import REASONING_PARSERS, TOOL_PARSERS


@dataclass
class ServeArgs:
    """The server's settings.

    Raises:
        ParameterError: a value that cannot be honoured.
    """

    host: str | None = None
    port: int = 8000
    uds: str | None = None
    api_key: list[str] = field(default_factory=list)
    served_model_name: list[str] = field(default_factory=list)
    default_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_request_chat_template: bool = False
    response_role: str = "assistant"
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    reasoning_content_field: bool = True
    return_tokens_as_token_ids: bool = False
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False
    enable_tokenizer_info_endpoint: bool = False
    enable_server_load_tracking: bool = False
    enable_request_id_headers: bool = False
    enable_log_requests: bool = False
    max_log_len: int | None = None
    disable_fastapi_docs: bool = False
    disable_inspector: bool = False
    disable_uvicorn_access_log: bool = False
    uvicorn_log_level: str = "info"
    allowed_origins: list[str] = field(default_factory=list)
    allowed_methods: list[str] = field(default_factory=lambda: ["*"])
    allowed_headers: list[str] = field(default_factory=lambda: ["*"])
    allow_credentials: bool = False
    max_request_body_size: int = 32 * 1024 * 1024
    tenants: str | None = None
    max_num_queued_reqs: int = 0
    max_num_queued_tokens: int = 0
    request_timeout: float = 0.0
    client_timeout: float = 300.0
    middleware: list[str] = field(default_factory=list)
    root_path: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    ssl_ciphers: str | None = None
    stream_interval: int = 1
    sse_keep_alive_interval: float = 0.0
    shutdown_timeout: float = 30.0
    max_engine_restarts: int = 3
    h11_max_incomplete_event_size: int | None = None
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ParameterError("must be in 0..65535; 0 takes a free one", "port", self.port)
        for name in ("sse_keep_alive_interval", "shutdown_timeout", "max_request_body_size", "max_engine_restarts",
                     "max_num_queued_reqs", "max_num_queued_tokens", "request_timeout", "client_timeout"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ParameterError("must not be negative", name, getattr(self, name))
        if self.tenants is not None:
            read_tenants(self.tenants, tuple(self.api_key))  # what is wrong with it is told before a model is loaded
        if self.stream_interval < 1:
            raise ParameterError("must be at least 1", "stream_interval", self.stream_interval)
        for name, known in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if getattr(self, name) and getattr(self, name) not in known:
                raise ParameterError(f"must be one of {', '.join(known)}", name, getattr(self, name))
        if self.enable_auto_tool_choice and not self.tool_call_parser:
            raise ParameterError("needs tool_call_parser", "enable_auto_tool_choice", True)
        if self.otlp_traces_endpoint is not None:
            check_endpoint(self.otlp_traces_endpoint)
