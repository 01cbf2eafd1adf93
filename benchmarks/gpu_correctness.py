"""The checks of gpu_check.py: each returns what it found, with ``passed`` where that is a matter of judgement."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_engine import Setup, fixed, free_memory, generate

from nanovllm.engine.llm_engine import LLMEngine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def operators(setup: Setup) -> dict[str, Any]:
    """The tests of the Triton kernels, on the device; the files run side by side, since most of it is compiling."""
    names = ["attention", "elementwise", "linear", "sampling", "penalties"]
    selected = ["-k", "plan or tiles or norms or items"] if setup.quick else []
    environment = {**os.environ, "NANOVLLM_TEST_DEVICE": setup.device, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", f"tests/test_cuda_{name}.py", *selected],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in names
    }  # fmt: skip
    results: dict[str, Any] = {}
    for name, process in running.items():
        output = process.communicate()[0]
        code = process.returncode
        results[name] = output.strip().splitlines()[-1] if code in (0, 5) else output[-4000:]  # 5: none selected
        results["passed"] = results.get("passed", True) and code in (0, 5)
    return results


def parity(setup: Setup) -> dict[str, Any]:
    """Log-probabilities of a prompt, and greedy tokens, against transformers on the same device."""
    from tiny_models import make_checkpoint, reference_greedy

    sizes = {
        "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_hidden_layers": 4,
    }  # fmt: skip
    if setup.quick:
        sizes = {}
    prompt = [random.Random(0).randrange(3, 120) for _ in range(setup.few(300, 30))]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder), "qwen3", max_position_embeddings=1024, **sizes).to(setup.device)
        exact = _prompt_logprobs(model, prompt, setup.device)
        steps = setup.few(64, 4)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            model = model.to(dtype)
            theirs = _prompt_logprobs(model, prompt, setup.device)
            with setup.engine(Path(folder), dtype=name, max_model_len=512, num_gpu_blocks_override=100) as llm:
                ours = our_prompt_logprobs(llm, prompt)
                tokens = generate(llm, [prompt], fixed(steps))[0]
            free_memory()
            error, their_error = (ours - exact).abs().mean().item(), (theirs - exact).abs().mean().item()
            results[f"{name} mean error"], results[f"transformers {name} mean error"] = error, their_error
            # In bfloat16 both round; ours may be as wrong as theirs, with room for another order of the sums.
            right = error < 1e-4 if name == "float32" else error < 1.5 * their_error + 1e-3
            if name == "float32":
                with torch.device(setup.device):
                    right = right and tokens == reference_greedy(model, prompt, steps)
            results["passed"] = results.get("passed", True) and right
        del model
    free_memory()
    return results


@torch.no_grad()
def _prompt_logprobs(model: Any, prompt: list[int], device: str) -> torch.Tensor:
    logits = model(torch.tensor([prompt], device=device), use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:], device=device)[:, None])[:, 0].cpu()


def our_prompt_logprobs(llm: Any, prompt: list[int]) -> torch.Tensor:
    params = fixed(1, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    found = output.prompt_logprobs
    return torch.tensor([found[i][token].logprob for i, token in enumerate(prompt) if i])


def _mixed_requests(setup: Setup) -> tuple[list[list[int]], list[Any]]:
    draw = random.Random(1)
    count = setup.few(37, 5)
    prompts = [[draw.randrange(3, 5000) for _ in range(draw.randint(1, setup.few(700, 30)))] for _ in range(count)]
    return prompts, [fixed(draw.randint(1, setup.few(120, 8))) for _ in prompts]


def graphs(setup: Setup) -> dict[str, Any]:
    """Recorded steps give the tokens of single launches, with batches that shrink from a number that fits no bucket."""
    prompts, params = _mixed_requests(setup)
    tokens = []
    for eager in (False, True):
        with setup.engine(enforce_eager=eager, max_num_seqs=setup.few(29, 3)) as llm:
            tokens.append(generate(llm, prompts, params))
        free_memory()
    different = sum(a != b for a, b in zip(*tokens, strict=True))
    return {"passed": different == 0, "requests": len(prompts), "different": different}


def attention_backends(setup: Setup) -> dict[str, Any]:
    """Every attention that is installed agrees with the first, in prompts and in recorded decodes of mixed batches."""
    draw = random.Random(3)
    prompt = [draw.randrange(3, 5000) for _ in range(setup.few(300, 30))]
    prompts, params = _mixed_requests(setup)
    results: dict[str, Any] = {}
    wanted: torch.Tensor | None = None
    for backend in setup.attention_backends():
        with setup.engine(attention_backend=backend, max_num_seqs=setup.few(29, 3)) as llm:
            found = our_prompt_logprobs(llm, prompt)
            lengths = [len(tokens) for tokens in generate(llm, prompts, params)]
            scored = llm.generate([{"prompt_token_ids": prompt}], fixed(8, logprobs=0), use_tqdm=False)[0].outputs[0]
        free_memory()
        last = torch.tensor([scored.logprobs[0][scored.token_ids[0]].logprob])
        found = torch.cat([found, last])
        wanted = found if wanted is None else wanted
        results[backend or "own"] = (found - wanted).abs().mean().item()
        right = results[backend or "own"] < 0.04 and lengths == [each.max_tokens for each in params]
        results["passed"] = results.get("passed", True) and right
    return results


def prefix_cache(setup: Setup) -> dict[str, Any]:
    """A prompt whose beginning is cached gives the tokens it gave before. float32: chunks round differently."""
    draw = random.Random(2)
    shared = [draw.randrange(3, 5000) for _ in range(setup.few(512, 48))]
    prompts = [shared + [draw.randrange(3, 5000) for _ in range(20)] for _ in range(4)]
    with setup.engine(dtype="float32", max_num_seqs=8) as llm:
        cold = [generate(llm, [prompt], fixed(setup.few(32, 4)))[0] for prompt in prompts]
        (output,) = llm.generate([{"prompt_token_ids": prompts[0]}], fixed(1), use_tqdm=False)
        cached = output.num_cached_tokens or 0
        warm = generate(llm, prompts, fixed(setup.few(32, 4)))
        assert llm.reset_prefix_cache()
        again = generate(llm, prompts[:1], fixed(setup.few(32, 4)))
    free_memory()
    return {"passed": cold == warm and again == cold[:1] and cached >= len(shared) // 16 * 16, "cached tokens": cached}


def preemption(setup: Setup) -> dict[str, Any]:
    """With too few blocks requests are preempted and recomputed, and give the same tokens."""
    prompts, params = _mixed_requests(setup)
    tokens = []
    longest = max(len(p) + q.max_tokens for p, q in zip(prompts, params, strict=True))
    for blocks in (400 if setup.quick else 4000, -(-longest // 16) + setup.few(20, 2)):
        with setup.engine(dtype="float32", num_gpu_blocks_override=blocks, max_num_seqs=16) as llm:
            tokens.append(generate(llm, prompts, params))
        free_memory()
    different = sum(a != b for a, b in zip(*tokens, strict=True))
    return {"passed": different == 0, "requests": len(prompts), "different": different}


def out_of_memory(setup: Setup) -> dict[str, Any]:
    """Somebody else takes nearly all memory that is left: steps become smaller, and requests give the same tokens."""
    draw = random.Random(4)
    prompts = [[draw.randrange(3, 5000) for _ in range(setup.few(2000, 40))] for _ in range(8)]
    params = fixed(setup.few(16, 4))
    with setup.engine(
        dtype="float32", max_num_seqs=8, enable_prefix_caching=False, num_gpu_blocks_override=1200
    ) as llm:
        wanted = generate(llm, prompts, params)
        runner = llm.llm_engine.core.executor._runner
        recover, forward, count = runner.recover, runner.forward, 0

        def counted() -> None:
            nonlocal count
            count += 1
            recover()

        def limited(input_ids: torch.Tensor, *arguments: Any) -> torch.Tensor:
            if input_ids.shape[0] > 50:
                raise torch.OutOfMemoryError("out of memory")
            return forward(input_ids, *arguments)

        runner.recover = counted
        if setup.on_gpu:
            free_memory()
            taken = torch.empty(max(0, torch.cuda.mem_get_info()[0] - (256 << 20)), dtype=torch.uint8, device="cuda")
        else:
            runner.forward, taken = limited, None
        found = generate(llm, prompts, params)
        del taken, runner
    free_memory()
    return {"passed": found == wanted and count > 0, "steps without memory": count}


def neighbour(setup: Setup) -> dict[str, Any]:
    """Another process holds a third of the memory: the engine takes what is left, and works."""
    code = (
        "import sys, torch\n"
        "held = torch.zeros(int(sys.argv[1]), dtype=torch.uint8, device=sys.argv[2])\n"
        "print('holding', flush=True)\n"
        "input()"
    )

    def memory() -> tuple[int, int]:
        return torch.cuda.mem_get_info() if setup.on_gpu else (2**30, 2**30)

    command = [sys.executable, "-c", code, str(memory()[1] // 3 if setup.on_gpu else 2**20), setup.device]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline().strip() == "holding"
        free, total = memory()
        with setup.engine(max_num_seqs=setup.few(512, 4), max_model_len=setup.few(40_000, 64)) as llm:  # all of it
            taken = free - memory()[0]
            (tokens,) = generate(llm, [[5, 6, 7]], fixed(4))
        free_memory()
    finally:
        other.communicate("\n")
    return {"passed": len(tokens) == 4 and taken < free, "free": free / total, "taken": taken / total}


def abort(setup: Setup) -> dict[str, Any]:
    """Requests aborted while two steps are in flight: the others give the tokens they give alone, blocks come back."""
    prompts = [[7 * i + j for j in range(20)] for i in range(8)]
    steps = setup.few(60, 10)
    with setup.engine(dtype="float32", max_num_seqs=8, async_scheduling=True) as llm:
        alone = generate(llm, prompts, fixed(steps))
        engine: LLMEngine = llm.llm_engine
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, fixed(steps))
        found: dict[str, list[int]] = {}
        count = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished and output.outputs[0].finish_reason == "length":
                    found[output.request_id] = list(output.outputs[0].token_ids)
            count += 1
            if count == 3:
                engine.abort_request(["1", "4"])
            if count == 5:
                engine.abort_request("6")
        empty = llm.reset_prefix_cache()  # only if nobody holds a block
    free_memory()
    kept = [i for i in range(8) if i not in (1, 4, 6)]
    return {
        "passed": sorted(found) == [str(i) for i in kept] and all(found[str(i)] == alone[i] for i in kept) and empty
    }


def waiting(setup: Setup) -> dict[str, Any]:
    """No call that launches a step waits for the device: torch reports those that do, by what is asked of a request."""
    watch: Callable[[str], None] = torch.cuda.set_sync_debug_mode if setup.on_gpu else lambda mode: None
    kinds = {
        "greedy": fixed(16),
        "temperature": fixed(16, 0.7),
        "top_p": fixed(16, 0.7, top_p=0.8),
        "top_k": fixed(16, 0.7, top_k=20),
        "min_p": fixed(16, 0.7, min_p=0.05),
        "penalties": fixed(16, 0.7, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.2),
        "named tokens": fixed(16, 0.7, logit_bias={5: 1.0}, allowed_token_ids=[5, 6, 7]),
        "logprobs": fixed(16, logprobs=5, prompt_logprobs=2),
    }
    results: dict[str, Any] = {}
    with setup.engine(max_num_seqs=8) as llm:
        runner = llm.llm_engine.core.executor._runner
        launch = runner.launch
        prompts = [[3 + i] * 20 for i in range(8)]
        for name, params in kinds.items():
            generate(llm, prompts, params)  # kernels and graphs are made

            def watched(plan: Any) -> Any:
                watch("warn")
                try:
                    return launch(plan)
                finally:
                    watch("default")

            runner.launch = watched
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                generate(llm, prompts, params)
            runner.launch = launch
            places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})
            results[name] = places
    free_memory()
    return {"passed": not any(results.values()), **results}


CHECKS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "operators": operators,
    "parity": parity,
    "attention_backends": attention_backends,
    "graphs": graphs,
    "prefix_cache": prefix_cache,
    "preemption": preemption,
    "out_of_memory": out_of_memory,
    "abort": abort,
    "neighbour": neighbour,
    "waiting": waiting,
}
