"""Who was refused, what ended too late, and what tenants use, in ``/metrics``.

Names that vLLM has are vLLM's; the others begin with ``nanovllm:``. Values of the label ``tenant`` are the names in the
file of tenants, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanovllm.entrypoints.serve.metrics import LABELS

if TYPE_CHECKING:
    from nanovllm.engine.async_llm import AsyncLLM
    from nanovllm.entrypoints.serve.accounts import Account
    from nanovllm.entrypoints.serve.admission import Admission

_COUNTERS: tuple[tuple[str, str, Callable[[Account], int]], ...] = (
    ("requests", "Requests of a tenant that were let in.", lambda account: account.num_requests),
    ("prompt_tokens", "Tokens of a tenant's prompts.", lambda account: account.num_prompt_tokens),
    ("generation_tokens", "Tokens generated for a tenant's requests that have ended.",
     lambda account: account.num_generated_tokens),
)  # fmt: skip


class AdmissionMetrics(Collector):
    """Tells Prometheus what an `Admission` has counted."""

    def __init__(self, admission: Admission, engine: AsyncLLM, model_name: str) -> None:
        self._admission = admission
        self._stats = engine.stats
        self._labels = [model_name, "0"]

    def collect(self) -> Iterable[Metric]:
        """All metrics as they are now."""
        text = "Requests refused because the server was full, by the limit that was met."
        family = CounterMetricFamily("vllm:admission_rejections", text, labels=[*LABELS, "reason"])
        for reason, count in self._admission.rejected.items():
            family.add_metric([*self._labels, reason], count)
        yield family
        text = "Requests aborted because they did not end in the time they had."
        family = CounterMetricFamily("nanovllm:request_timeouts", text, labels=LABELS)
        family.add_metric(self._labels, self._stats.num_timeouts)
        yield family
        yield from self._tenants()

    def _tenants(self) -> Iterator[Metric]:
        accounts = self._admission.accounts
        for name, text, value in _COUNTERS:
            family = CounterMetricFamily(f"nanovllm:tenant_{name}", text, labels=[*LABELS, "tenant"])
            for tenant, account in accounts.items():
                family.add_metric([*self._labels, tenant], value(account))
            yield family
        text = "Requests of a tenant that were refused, by reason: the quota that was used up, or a full server."
        family = CounterMetricFamily("nanovllm:tenant_rejections", text, labels=[*LABELS, "tenant", "reason"])
        for tenant, account in accounts.items():
            for reason, count in account.rejected.items():
                family.add_metric([*self._labels, tenant, reason], count)
        yield family
        for index, (name, text) in enumerate((("running", "Requests of a tenant in the batch."),
                                              ("waiting", "Requests of a tenant in the queue."))):  # fmt: skip
            gauge = GaugeMetricFamily(f"nanovllm:tenant_requests_{name}", text, labels=[*LABELS, "tenant"])
            for tenant in accounts:
                gauge.add_metric([*self._labels, tenant], self._stats.tenants.get(tenant, (0, 0))[index])
            yield gauge
