"""vLLM's older way to start the server: ``python -m nanovllm.entrypoints.openai.api_server``."""
