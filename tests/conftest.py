"""Settings for the whole test run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NANOVLLM_LOGGING_LEVEL", "WARNING")
if os.environ.get("NANOVLLM_TEST_DEVICE", "cpu") == "cpu":  # see cuda_device.py
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

# Examples are drawn from fixed seeds: a run of the tests is reproducible.
settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("default")
