"""``python -m nanovllm.entrypoints.openai.api_server --model X`` is ``nanovllm serve X``."""

import sys

from nanovllm.entrypoints.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
