from nanovllm.ops.reference import paged_attention, prepare_attention  # noqa: F401
