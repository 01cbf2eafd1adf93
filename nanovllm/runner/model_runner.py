"""The model runner: loads a model, owns its KV cache, and carries out plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.plan import StepPlan, StepResult, TokenLogprobs
from nanovllm.models import build_model, load_weights
from nanovllm.ops import AttentionMetadata, Forward, operator_table
from nanovllm.ops.transfer import HostCopy
from nanovllm.parallel import ParallelContext
from nanovllm.platforms import get_platform
from nanovllm.runner.choice import choose_by_sorting
from nanovllm.runner.guidance import Guidance, apply_limits
from nanovllm.runner.input_batch import InputBatch, StepInput
from nanovllm.runner.kv_cache import allocate, bytes_per_block, count_blocks, log_size
from nanovllm.runner.logprobs import Reader, gather_logprobs
from nanovllm.runner.pooler import Pooler
from nanovllm.runner.ragged import to_device
from nanovllm.runner.sampler import Sampler, mark_invalid
from nanovllm.runner.trial import tune_attention

if TYPE_CHECKING:
    from nanovllm.config import EngineConfig
    from nanovllm.engine.structured import Limits

# Prompt positions whose logits exist at a time: [PROMPT_ROWS, vocab] float32 is 39 MB for a vocabulary of 152k.
PROMPT_ROWS = 64

NOT_FINITE = "the model's logits are not finite numbers"


@dataclass(slots=True)
class PendingStep:
    """A step that has been launched; its tokens may still be on their way on the device."""

    token_ids: HostCopy  # int64 [S]; -1: the row's logits are no numbers
    logprobs: Mapping[int, TokenLogprobs]
    prompt_logprobs: dict[int, list[Reader]]
    limits: Limits | None = None  # on the tokens
    pooled: HostCopy | None = None  # float32 [P, hidden]

    def result(self) -> StepResult:
        """Wait for the step and bring its tokens to the host."""
        token_ids = self.token_ids.wait().tolist()
        prompts = {i: [scored for read in readers for scored in read()] for i, readers in self.prompt_logprobs.items()}
        result = StepResult(token_ids, dict(self.logprobs), prompts)
        if self.limits is not None:
            result.complete, result.failed = self.limits.complete, self.limits.judge(token_ids)
        if -1 in token_ids:
            invalid = [index for index, token in enumerate(token_ids) if token == -1]
            result.failed = {**dict.fromkeys(invalid, NOT_FINITE), **result.failed}
        if self.pooled is not None:
            result.pooled = list(self.pooled.wait().numpy())
        return result


class ModelRunner:
    """One rank's model with its weights, KV cache and rows.

    Attributes:
        num_blocks: blocks of the KV cache, the padding block included.
        kv_bytes_per_block: bytes of one block, K and V, all layers.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Load the weights and allocate the cache.

        Raises:
            ModelError: the checkpoint cannot be served.
            ParameterError: the device does not exist, or memory does not suffice for the KV cache.
        """
        platform = self.platform = get_platform(config.device)
        platform.load()
        platform.set_threads()
        self.device = torch.device(platform.device)
        self.ops = operator_table(platform.device, config.attention_backend, config.model.quantization)
        model = config.model
        self.model = build_model(
            model.hf_config,
            model.architecture,
            dtype=getattr(torch, model.dtype),
            device=platform.device,
            ops=self.ops,
            parallel=ParallelContext(),
            max_model_len=model.max_model_len,
        )
        if config.cache.dtype != "auto":
            self.model.kv_dtype = torch.float8_e4m3fn
        load_weights(self.model, model.path, model.load_format, model.seed)
        tune_attention(config, self.model, self.ops)

        block_size, max_rows = config.cache.block_size, config.scheduler.max_num_seqs
        self.num_blocks = count_blocks(config, self.model, platform)
        self.kv_bytes_per_block = bytes_per_block(self.model, block_size)
        self.kv_caches = allocate(self.model, self.num_blocks, block_size, self.device)
        self.forward = self._record(config)
        log_size(config, self.num_blocks, self.num_blocks * self.kv_bytes_per_block)

        self.batch = InputBatch(max_rows, block_size, self.device, self.num_blocks)
        sorting = partial(choose_by_sorting, keep=self.ops.keep_likeliest) if self.ops.choose_by_sorting else None
        choose = self.ops.choose or sorting
        self.sampler = Sampler(max_rows, self.model.vocab_size, model.logprobs_mode, choose, self.ops.penalise)
        self.guidance = Guidance(model)
        self.pooler = Pooler()
        # row -> (number of likeliest, ids asked for by name, prompt length)
        self._prompt_logprobs: dict[int, tuple[int, Tensor | None, int]] = {}

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step. Steps run in the order of their launch; a step that raises leaves the runner usable."""
        self._apply(plan)
        guidance = self.guidance.begin(plan)
        inputs = self.batch.prepare(plan)
        hidden = self.forward(inputs.input_ids, inputs.positions, inputs.meta)
        # Prompt first: its logits are gone before those of the sampled rows come.
        prompt_logprobs = self._score_prompts(plan, inputs, hidden) if self._prompt_logprobs else {}
        vectors = self.pooler.pool(plan, hidden, inputs.meta.query_start_loc)
        pooled = None if vectors is None else HostCopy(vectors)
        if not plan.sampled:
            return PendingStep(HostCopy(torch.empty(0, dtype=torch.int64)), {}, prompt_logprobs, pooled=pooled)
        if inputs.sampled_tokens is not None:
            hidden = hidden.index_select(0, inputs.sampled_tokens)
        rows, positions = inputs.sampled_rows, inputs.sampled_positions
        with self.platform.sampling(len(rows) * self.model.vocab_size):
            logits = self.model.compute_logits(hidden)
            limits = None if guidance is None else guidance.limits.result()
            forced = None if limits is None else apply_limits(logits, limits)
            token_ids, logprobs = self.sampler.sample(logits, rows, positions, self.batch.tokens, forced)
        self.batch.append(rows, positions, token_ids)
        if guidance is not None:
            self.guidance.end(guidance, HostCopy(token_ids))
        return PendingStep(HostCopy(mark_invalid(token_ids, logits)), logprobs, prompt_logprobs, limits, pooled)

    @torch.inference_mode()
    def _record(self, config: EngineConfig) -> Forward:
        """The model's forward pass over our caches: recorded, where the device can and it is wanted."""
        model, kv_caches = self.model, self.kv_caches

        def forward(input_ids: Tensor, positions: Tensor, meta: AttentionMetadata) -> Tensor:
            return model.forward(input_ids, positions, kv_caches, meta)

        most = config.scheduler.max_num_batched_tokens
        return self.ops.record(forward, most, config.cache.block_size, config.enforce_eager) or forward

    def recover(self) -> None:
        """After a step that raised: see that the device still works, and give back all memory that can be had again.

        Raises what the device raises if it takes no further work.
        """
        device = None if self.device.type == "cpu" else torch.get_device_module(self.device)
        if device is not None:
            device.synchronize()
        release = getattr(self.forward, "release", None)  # what is recorded holds memory, and may be to blame
        if release is not None:
            release()
        if device is not None:
            device.empty_cache()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a step and wait for it."""
        return self.launch(plan).result()

    def _apply(self, plan: StepPlan) -> None:
        """Bring rows and cache up to date: starts, block updates, copies, in this order."""
        for start in plan.starts:
            self.batch.start(start.row, start.token_ids)
            self.sampler.start(start)
            self.guidance.start(start)
            self.pooler.start(start)
            self._prompt_logprobs.pop(start.row, None)
            if (asked := start.params.prompt_logprobs) is not None:
                count = self.model.vocab_size if asked == -1 else min(asked, self.model.vocab_size)
                named = start.params.prompt_logprob_token_ids
                ids = None if named is None else to_device(np.array(named, np.int64), self.device)
                self._prompt_logprobs[start.row] = count, ids, start.num_prompt_tokens
        self.batch.update_blocks(plan.block_updates)
        if plan.copies:
            sources, targets = zip(*plan.copies, strict=True)
            self.ops.copy_blocks(self.kv_caches, sources, targets)

    def _score_prompts(self, plan: StepPlan, inputs: StepInput, hidden: Tensor) -> dict[int, list[Reader]]:
        """Log-probabilities of the prompt tokens that follow the computed ones, for the rows that asked."""
        found: dict[int, list[Reader]] = {}
        for index, row in enumerate(plan.rows):
            if row not in self._prompt_logprobs:
                continue
            count, named, num_prompt = self._prompt_logprobs[row]
            first, begin = plan.num_computed[index], inputs.meta.query_start_loc[index]
            # The logits at a position judge the token behind it; the prompt's last position judges the first output.
            scored = min(plan.num_new[index], num_prompt - 1 - first)
            results: list[Reader] = []
            for done in range(0, scored, PROMPT_ROWS):
                end = min(done + PROMPT_ROWS, scored)
                scores = self.sampler.to_scores(self.model.compute_logits(hidden[begin + done : begin + end]))
                tokens = self.batch.tokens[row, first + done + 1 : first + end + 1].to(torch.int64)
                results.append(gather_logprobs(scores, tokens, count, named))
            if results:
                found[index] = results
        return found


_NO_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory did not suffice. Torch has a class for it on devices; on the CPU, and of libraries, only words.

    What raised while another error was under way (the end of a recording) has that behind it.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
