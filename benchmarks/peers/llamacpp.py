"""llama.cpp through the C interface of llama-cpp-python. FORMAT is bf16, q8_0 or q4_0; tokens are chosen greedily.

``convert`` writes the GGUF file of a checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from workloads import Workload

from peers import Generate, measure

# Our name of a tensor of a layer -> that of GGUF.
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load(model: str, number_format: str) -> Generate:
    import llama_cpp as llama
    import numpy as np

    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    llama.llama_backend_init()
    weights = llama.llama_model_load_from_file(
        f"{model}/{number_format}.gguf".encode(), llama.llama_model_default_params()
    )
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 16384, 2048, 512, 32
    settings.n_threads = settings.n_threads_batch = threads
    settings.kv_unified = True
    context = llama.llama_init_from_model(weights, settings)
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(weights))

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, whether its logits are wanted) each."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def choose(index: int) -> int:
        logits = llama.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, shape=(vocab_size,)).argmax())

    def generate(work: Workload) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        last: dict[int, int] = {}
        pending: list[tuple[int, int, int, bool]] = []
        ends: list[tuple[int, int]] = []

        def flush() -> None:
            if pending:
                decode(pending)
                last.update((sequence, choose(index)) for sequence, index in ends)
            pending.clear()
            ends.clear()

        for sequence, prompt in enumerate(work.prompts):
            if len(pending) + len(prompt) > 2048:
                flush()
            pending += [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]
            ends.append((sequence, len(pending) - 1))
        flush()
        done = 1
        while active := [s for s, length in enumerate(work.output_lens) if length > done]:
            decode([(last[s], len(work.prompts[s]) + done - 1, s, True) for s in active])
            for index, sequence in enumerate(active):
                last[sequence] = choose(index)
            done += 1

    return generate


def convert(source: Path, target: Path, number_format: str) -> None:
    """Write a Qwen3 checkpoint as GGUF."""
    import gguf
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    kind = {
        "bf16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
        "q4_0": gguf.GGMLQuantizationType.Q4_0,
    }[number_format]
    writer = gguf.GGUFWriter(str(target), "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(16384)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    # A tokenizer must be there, though only token ids are used: single bytes, and names that never occur.
    tokens = [f"<0x{i:02X}>" if i < 256 else f"<{i}>" for i in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for name, tensor in load_file(str(source / "model.safetensors")).items():
        if name == "lm_head.weight":
            continue  # tied
        array = tensor.float().numpy()
        if array.ndim == 1:
            writer.add_tensor(_gguf_name(name), array)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        measure(load)
