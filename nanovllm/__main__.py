"""``python -m nanovllm`` is the ``nanovllm`` command."""

from nanovllm.entrypoints.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
