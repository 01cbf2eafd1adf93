"""OpenVINO GenAI's continuous batching; FORMAT, fp16 (run as bfloat16) or int8, is how weights were exported."""

from __future__ import annotations

from workloads import Workload

from peers import Generate, measure


def load(model: str, number_format: str) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 2, 64, 2048
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(f"{model}/{number_format}", scheduler, "CPU")

    def generate(work: Workload) -> None:
        handles = []
        for number, (prompt, length) in enumerate(zip(work.prompts, work.output_lens)):  # noqa: B905
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = length
            config.ignore_eos = True
            if work.temperature > 0:
                config.do_sample, config.temperature = True, work.temperature
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(pipeline.add_request(number, ids, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        lengths = [len(handle.read_all()[0].generated_ids) for handle in handles]
        assert lengths == work.output_lens, lengths

    return generate


if __name__ == "__main__":
    measure(load)
