"""From what the user typed as ``model`` to a local folder: the model in the box, a path, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from nanovllm.errors import ModelError

DEMO_MODEL = "demo"
DEMO_PATH = Path(__file__).parent / "assets" / "demo"
SMALL_DEMO_MODEL = "demo-small"  # with the same tokenizer: it can draft tokens for the other

# What an engine reads of a repository: no pickled weights, no training state, no other framework's files.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "tokenizer*"]
_SECOND_COPIES = ["consolidated*", "original/*"]  # the same weights in the author's own format


def wants_modelscope(use_modelscope: bool | None = None) -> bool:
    """Whether hub ids are looked up on ModelScope: by option, by ``NANOVLLM_USE_MODELSCOPE``, or by vLLM's variable."""
    if use_modelscope is not None:
        return use_modelscope
    value = os.environ.get("NANOVLLM_USE_MODELSCOPE", os.environ.get("VLLM_USE_MODELSCOPE", ""))
    return value.strip().lower() in ("1", "true", "yes", "on")


def resolve_model_path(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | bool | None = None,
    use_modelscope: bool | None = None,
    weights: bool = True,
) -> Path:
    """Return a local folder that holds ``model``; download it if it is a hub id.

    Args:
        model: ``"demo"`` or ``"demo-small"``, a folder, or a hub id such as ``Qwen/Qwen3-0.6B``.
        weights: False fetches configuration and tokenizer only (``load_format="dummy"``).

    Raises:
        ModelError: nothing is found under that name; the message says what was tried.
    """
    name = os.fspath(model)
    if name in (DEMO_MODEL, SMALL_DEMO_MODEL):  # always ours; a folder of that name is ./demo
        folder = DEMO_PATH if name == DEMO_MODEL else DEMO_PATH.with_name(name)
        if not (folder / "config.json").is_file():
            raise ModelError(f"the model in the box is missing from {folder}: reinstall nano-vllm-ascend")
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model={name!r} is a file; give the folder that holds config.json")
    if name.startswith((".", "~", os.sep)) or name.count("/") != 1:
        raise ModelError(f"model={name!r}: no such folder, and not a hub id of the form 'owner/name'")
    if wants_modelscope(use_modelscope):
        return _from_modelscope(name, revision, download_dir, weights)
    return _from_huggingface(name, revision, download_dir, hf_token, weights)


def _patterns(weights: bool) -> list[str]:
    return _PATTERNS if weights else [p for p in _PATTERNS if p != "*.safetensors"]


def _from_huggingface(
    name: str, revision: str | None, download_dir: str | None, token: str | bool | None, weights: bool
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=download_dir,
            token=token,
            allow_patterns=_patterns(weights),
            ignore_patterns=_SECOND_COPIES,
        )
    except Exception as error:  # the hub client has a dozen kinds; the user needs one sentence
        raise ModelError(
            f"model={name!r}: not a local folder, and downloading it from the Hugging Face hub failed: {error}. "
            "Check the name, the network, HF_ENDPOINT and HF_TOKEN, or set NANOVLLM_USE_MODELSCOPE=1 to use ModelScope."
        ) from error
    return Path(folder)


def _from_modelscope(name: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ModelError("ModelScope is asked for but not installed: pip install modelscope") from error
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=_patterns(weights),
            ignore_patterns=_SECOND_COPIES,
        )
    except Exception as error:
        raise ModelError(f"model={name!r}: downloading it from ModelScope failed: {error}") from error
    return Path(folder)
