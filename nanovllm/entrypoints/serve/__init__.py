"""The HTTP server: OpenAI's endpoints, and those vLLM adds, over an `AsyncLLM`."""
