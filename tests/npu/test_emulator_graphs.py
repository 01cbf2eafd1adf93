"""Captured graphs: addresses and host integers are those of the capture, until a task update changes them."""

import pytest
import torch
from on_npu import DEVICE, npu, randn, refused, torch_npu

schedules = pytest.mark.parametrize(
    "schedule",
    [
        pytest.param("eager", marks=pytest.mark.emulated),
        pytest.param("lazy", marks=pytest.mark.emulated(lazy=1)),
        pytest.param("lazy", marks=pytest.mark.emulated(lazy=1, seed=1)),
    ],
)


@schedules
def test_replay_computes_on_what_the_addresses_hold(schedule: str) -> None:
    x, y = npu(torch.ones(4)), npu(torch.zeros(4))
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        y.copy_(x * 2 + 1)
    assert y.tolist() == [0.0] * 4, "capturing must not run anything"
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value + 1] * 4


@schedules
def test_branches_of_a_graph_keep_their_order(schedule: str) -> None:
    x, y = npu(torch.ones(4)), npu(torch.zeros(4))
    side = torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        x.add_(1)
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            y.copy_(x)
        torch.npu.current_stream().wait_stream(side)
        x.mul_(10)
    for _ in range(2):
        graph.replay()
    assert x.tolist() == [210.0] * 4
    assert y.tolist() == [21.0] * 4


@pytest.mark.emulated
def test_a_branch_that_is_not_joined_is_an_error() -> None:
    side, graph, x = torch.npu.Stream(), torch.npu.NPUGraph(), npu(torch.ones(4))
    torch.npu.synchronize()
    with refused("not joined back"), torch.npu.graph(graph):
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            x.add_(1)


@pytest.mark.emulated
def test_reading_a_result_while_capturing_is_an_error() -> None:
    graph, x = torch.npu.NPUGraph(), npu(torch.ones(4))
    torch.npu.synchronize()
    with pytest.raises(RuntimeError, match="107027"), torch.npu.graph(graph):
        x.cpu()


@pytest.mark.emulated(streams=60)
def test_graphs_use_up_streams() -> None:
    x, graphs = npu(torch.ones(4)), []
    torch.npu.synchronize()
    with refused("no stream resource"):
        for _ in range(60):
            graphs.append(torch.npu.NPUGraph())
            with torch.npu.graph(graphs[-1]):
                x.add_(1)
    assert len(graphs) > 1
    graphs[0].replay()


# ---- attention: the lengths are host integers ---------------------------------------------------------------------

BLOCK, HEADS, DIM = 128, 2, 128


class _Decode:
    """One decode step of paged attention, its inputs at fixed addresses."""

    def __init__(self) -> None:
        cache = randn(4, BLOCK, HEADS * DIM, dtype=torch.float16)
        self.query = npu(randn(2, HEADS, DIM, dtype=torch.float16, seed=1))
        self.keys, self.values = npu(cache), npu(cache.flip(1).contiguous())
        self.table = npu(torch.tensor([[0, 1], [3, 2]], dtype=torch.int32))
        self.mask = npu(torch.ones(2048, 2048, dtype=torch.int8).triu(1))
        self.out = torch.empty_like(self.query)
        self.lse = torch.empty(1, dtype=torch.float32, device=DEVICE)

    def arguments(self, lengths: list[int]) -> dict:
        return dict(
            query=self.query, key=self.keys, value=self.values, atten_mask=self.mask, block_table=self.table,
            actual_seq_lengths=[1, 2], actual_seq_lengths_kv=lengths, num_heads=HEADS, num_key_value_heads=HEADS,
            scale=DIM**-0.5, input_layout="TND", sparse_mode=3, block_size=BLOCK,
        )  # fmt: skip

    def run(self, lengths: list[int], workspace: torch.Tensor) -> None:
        function = torch_npu.npu_fused_infer_attention_score.out
        function(**self.arguments(lengths), workspace=workspace, out=[self.out, self.lse])

    def expected(self, lengths: list[int]) -> torch.Tensor:
        return torch_npu.npu_fused_infer_attention_score(**self.arguments(lengths))[0].cpu()

    def workspace(self) -> torch.Tensor:
        return torch_npu._npu_fused_infer_attention_score_get_max_workspace(**self.arguments([1, 1]))


@schedules
def test_lengths_are_baked_into_a_graph(schedule: str) -> None:
    step = _Decode()
    graph, workspace = torch.npu.NPUGraph(), step.workspace()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        step.run([5, 130], workspace)
    graph.replay()
    assert torch.equal(step.out.cpu(), step.expected([5, 130]))
    assert not torch.equal(step.out.cpu(), step.expected([6, 131]))


@schedules
@pytest.mark.parametrize("forgotten", ["", "update", "record"])
def test_a_task_update_brings_new_lengths(schedule: str, forgotten: str) -> None:
    step = _Decode()
    graph, workspace, event, update_stream = (
        torch.npu.NPUGraph(), step.workspace(), torch.npu.ExternalEvent(), torch.npu.Stream(),
    )  # fmt: skip
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        stream = torch.npu.current_stream()
        event.wait(stream)
        event.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        step.run([5, 130], workspace)
        handle = torch.npu.graph_task_group_end(stream)
    for lengths in ([6, 131], [7, 200]):
        graph.replay()
        with torch.npu.stream(update_stream):
            if forgotten != "update":
                torch.npu.graph_task_update_begin(update_stream, handle)
                step.run(lengths, workspace)
                torch.npu.graph_task_update_end(update_stream)
            if forgotten != "record":
                event.record(update_stream)
        if forgotten == "record":
            with refused("would DEADLOCK"):
                torch.npu.synchronize()
            return
        found = step.out.cpu()
        assert torch.equal(found, step.expected(lengths)) == (forgotten == "")


@pytest.mark.emulated
def test_an_update_must_give_the_same_operators() -> None:
    step = _Decode()
    graph, workspace, stream = torch.npu.NPUGraph(), step.workspace(), torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        torch.npu.graph_task_group_begin(torch.npu.current_stream())
        step.run([5, 130], workspace)
        handle = torch.npu.graph_task_group_end(torch.npu.current_stream())
    with torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, handle)
        with refused("InplaceAdds? in place of aclnnFusedInferAttentionScoreV3"):
            step.out.add_(1)
        with refused("1 tasks of the group were not given"):
            torch.npu.graph_task_update_end(stream)


@schedules
def test_the_wheels_own_update_does_the_same(schedule: str) -> None:
    step = _Decode()
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        out, _ = torch_npu.npu_fused_infer_attention_score(**step.arguments([5, 130]))
    for lengths in ([6, 131], [7, 200]):
        graph.replay()
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lengths}])
        assert torch.equal(out.cpu(), step.expected(lengths))
