"""Mixtures of experts: choosing, sorting by expert, grouped products, and putting back in order."""

from __future__ import annotations

import torch

from .decode import Ints, Tensor, Tensors, float32  # noqa: F401
from .registry import IS_310P, SOC, operator, require


def _check_gating(x: Tensor, finished: Tensor | None, k: int, y: Tensor, experts: Tensor, rows: Tensor) -> None:
    require(0 < k <= min(x.shape[-1], 1024), f"k must be in 1..{min(x.shape[-1], 1024)}, not {k}")
    require(finished is None, "finished rows are not emulated")


@operator("MoeGatingTopKSoftmax", check=_check_gating)
def gating_top_k_softmax(x: Tensor, finished: Tensor | None, k: int, y: Tensor, experts: Tensor, rows: Tensor) -> None:
    weights, chosen = x.float().softmax(-1).topk(k, -1)
    tokens = chosen.shape[0]
    y.copy_(weights), experts.copy_(chosen)
    rows.copy_(torch.arange(tokens * k, device="cpu").view(k, tokens).T)


_SOFTMAX, _SIGMOID = 0, 1


def _check_gating_top_k(
    x: Tensor, bias: Tensor | None, k: int, k_group: int, groups: int, group_mode: int, renorm: int, norm: int,
    with_norm: bool, factor: float, epsilon: float, y: Tensor, experts: Tensor, norm_out: Tensor,
) -> None:  # fmt: skip
    require(not IS_310P, f"the operator does not exist on {SOC}")
    require(x.dim() == 2 and x.shape[1] <= 2048, f"x must be [tokens, at most 2048 experts], not {tuple(x.shape)}")
    require(renorm == 0, "renorm must be 0")
    require(norm in (_SOFTMAX, _SIGMOID) and group_mode in (0, 1), f"norm_type {norm}, group_select_mode {group_mode}")
    require(
        x.shape[1] % groups == 0 and 1 <= k_group <= groups, f"{k_group} of {groups} groups of {x.shape[1]} experts"
    )
    require(groups == 1 or x.shape[1] // groups > 2, "a group must have more than two experts")
    require(1 <= k <= x.shape[1] // groups * k_group, f"k {k} of {x.shape[1] // groups * k_group} experts")
    require(bias is None or (bias.dtype == x.dtype and bias.shape == x.shape[1:]), "bias must fit x")


@operator("MoeGatingTopK", check=_check_gating_top_k)
def gating_top_k(
    x: Tensor, bias: Tensor | None, k: int, k_group: int, groups: int, group_mode: int, renorm: int, norm: int,
    with_norm: bool, factor: float, epsilon: float, y: Tensor, experts: Tensor, norm_out: Tensor,
) -> None:  # fmt: skip
    scores = x.float().softmax(-1) if norm == _SOFTMAX else x.float().sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if groups > 1:
        of_groups = choice.view(x.shape[0], groups, -1)
        best = of_groups.amax(-1) if group_mode == 0 else of_groups.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(k_group, -1).indices, True)
        choice = of_groups.masked_fill(~kept[..., None], float("-inf")).view(x.shape)
    chosen = choice.topk(k, -1).indices
    weights = scores.gather(1, chosen)
    if norm == _SIGMOID:
        weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
    y.copy_(weights * factor), experts.copy_(chosen)
    if with_norm:
        norm_out.copy_(scores)


def _check_init_routing(
    x: Tensor, experts: Tensor, scale: Tensor | None, offset: Tensor | None, active: int, capacity: int, count: int,
    drop_pad: int, tokens_type: int, tokens_flag: bool, quant: int, expert_range: Ints, row_type: int,
    x_out: Tensor, rows: Tensor, tokens: Tensor, scale_out: Tensor,
) -> None:  # fmt: skip
    require(scale is None and offset is None and quant == -1, "quantisation is not emulated")
    require(not (IS_310P and x.dtype == torch.bfloat16), f"{SOC} has no bfloat16")
    require(experts.dtype == torch.int32, f"expert_idx must be int32, not {experts.dtype}")
    require(experts.dim() == 2 and experts.shape[0] == x.shape[0], f"expert_idx {tuple(experts.shape)}")
    require(tokens_flag, "expert_tokens_num_flag must be true")
    require(list(expert_range) == [0, count], f"active_expert_range {expert_range}: parts are not emulated")
    require(tokens_type == 1, f"expert_tokens_num_type {tokens_type} is not emulated (1: count)")


@operator("MoeInitRoutingV3", check=_check_init_routing)
def init_routing(
    x: Tensor, experts: Tensor, scale: Tensor | None, offset: Tensor | None, active: int, capacity: int, count: int,
    drop_pad: int, tokens_type: int, tokens_flag: bool, quant: int, expert_range: Ints, row_type: int,
    x_out: Tensor, rows: Tensor, tokens: Tensor, scale_out: Tensor,
) -> None:  # fmt: skip
    _route(x, experts, active, count, drop_pad, tokens_type == 0, row_type, x_out, rows, tokens)


def _route(
    x: Tensor, experts: Tensor, active: int, count: int, drop_pad: int, running_sums: bool, row_type: int,
    x_out: Tensor, rows: Tensor, tokens: Tensor,
) -> None:  # fmt: skip
    """Rows of x sorted by expert, a row for each of its experts, and where each went."""
    require(active in (-1, 0) or active >= experts.numel(), f"active_num {active} of {experts.numel()} is not emulated")
    require(drop_pad == 0, "drop_pad_mode must be 0")
    flat = experts.reshape(-1).long()
    require(bool(((flat >= 0) & (flat < count)).all()), f"an expert outside 0..{count - 1}")
    order = flat.sort(stable=True).indices
    x_out.copy_(x[order // experts.shape[1]])
    counts = torch.bincount(flat, minlength=count)
    tokens.copy_(counts.cumsum(0) if running_sums else counts)
    if row_type == 1:
        rows.copy_(order)
    else:
        rows.copy_(order.argsort())


_RUNNING_SUMS, _COUNTS = 1, 2


@operator("MoeInitRoutingV2")
def init_routing_v2(
    x: Tensor, experts: Tensor, active: int, capacity: int, count: int, drop_pad: int, tokens_type: int,
    before_capacity: bool, x_out: Tensor, rows: Tensor, tokens: Tensor, tokens_before: Tensor,
) -> None:  # fmt: skip
    """The older version, which torch_npu takes on the 310P; it asks it for running sums, whatever it was asked for."""
    require(tokens_type in (_RUNNING_SUMS, _COUNTS) and not before_capacity, "other counts are not emulated")
    _route(x, experts, active, count, drop_pad, tokens_type == _RUNNING_SUMS, 0, x_out, rows, tokens)


def _check_grouped(
    x: Tensors, weight: Tensors, bias: Tensors | None, scale: Tensors | None, offset: Tensors | None,
    antiquant_scale: Tensors | None, antiquant_offset: Tensors | None, token_scale: Tensors | None,
    groups: Tensor | None, activation_input: Tensors | None, activation_scale: Tensors | None,
    activation_offset: Tensors | None, split_item: int, group_type: int, list_type: int, activation: int,
    tuning: Ints | None, out: Tensors, feature: Tensors | None, dynamic: Tensors | None,
) -> None:  # fmt: skip
    optional = [scale, offset, antiquant_scale, antiquant_offset, token_scale, activation_input, activation_scale]
    optional += [activation_offset, feature, dynamic]
    require(not any(optional), "quantisation and activations are not emulated")
    require(activation == 0, f"act_type {activation} is not emulated")
    require(not (IS_310P and any(tensor.dtype != torch.float16 for tensor in x)), f"{SOC}: float16 only")
    for tensor in (*x, *weight):
        require(tensor.shape[-1] < 65536, f"the last dimension of {tuple(tensor.shape)} must stay below 65536")
    if group_type == -1:
        _check_separate(x, weight, bias, groups, split_item, out)
        return
    require(group_type == 0, f"group_type {group_type} is not supported")
    require(len(x) == len(weight) == len(out) == 1 and split_item in (2, 3), "one x, one weight, split_item 2 or 3")
    require(groups is not None and groups.dtype == torch.int64, "group_list must be an int64 tensor")
    require(weight[0].dim() == 3 and weight[0].shape[1] == x[0].shape[1], f"weight {tuple(weight[0].shape)}")
    require(groups.numel() == weight[0].shape[0], f"{groups.numel()} groups, {weight[0].shape[0]} experts")
    require(x[0].dtype == weight[0].dtype, f"x {x[0].dtype}, weight {weight[0].dtype}")
    require(list_type in (0, 1), f"group_list_type {list_type}")


def _check_separate(
    x: Tensors, weight: Tensors, bias: Tensors | None, groups: Tensor | None, split_item: int, out: Tensors
) -> None:
    """group_type -1: as many products as there are weights, each with an x and a result of its own."""
    require(not IS_310P, f"{SOC}: group_type 0 only")
    require(split_item in (0, 1), f"group_type -1 needs split_item 0 or 1, not {split_item}")
    require(groups is None or groups.numel() == 0, "group_type -1 takes no group_list")
    require(1 <= len(weight) <= 128, f"{len(weight)} weights, at most 128")
    require(len(x) == len(weight) == len(out), f"{len(x)} x, {len(weight)} weights and {len(out)} results")
    require(not bias or len(bias) == len(weight), "as many biases as weights")
    transposed = {not tensor.is_contiguous() for tensor in weight if min(tensor.shape) > 1}
    require(len(transposed) <= 1, "all weights must be transposed, or none")
    for a, b in zip(x, weight, strict=True):
        require(a.dtype in (torch.float16, torch.bfloat16), f"x is {a.dtype}; several results need 16 bits")
        require(a.dtype == b.dtype, f"x {a.dtype}, weight {b.dtype}")
        require(a.is_contiguous(), f"x must not be transposed, its strides are {a.stride()}")
        require(b.is_contiguous() or b.t().is_contiguous(), f"weight of strides {b.stride()}")
        require(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], f"x {tuple(a.shape)}, weight {tuple(b.shape)}")
    for row in bias or []:
        wanted = torch.float32 if x[0].dtype == torch.bfloat16 else torch.float16
        require(row.dtype == wanted, f"bias is {row.dtype}; for x of {x[0].dtype} it must be {wanted}")


@operator("GroupedMatmulV5", check=_check_grouped)
def grouped_matmul(
    x: Tensors, weight: Tensors, bias: Tensors | None, scale: Tensors | None, offset: Tensors | None,
    antiquant_scale: Tensors | None, antiquant_offset: Tensors | None, token_scale: Tensors | None,
    groups: Tensor | None, activation_input: Tensors | None, activation_scale: Tensors | None,
    activation_offset: Tensors | None, split_item: int, group_type: int, list_type: int, activation: int,
    tuning: Ints | None, out: Tensors, feature: Tensors | None, dynamic: Tensors | None,
) -> None:  # fmt: skip
    if group_type == -1:
        for i, result in enumerate(out):
            product = x[i].float() @ weight[i].float()
            result.copy_(product + bias[i].float() if bias else product)
        return
    ends = groups.cumsum(0).tolist() if list_type == 1 else groups.tolist()
    require(ends == sorted(ends), f"group_list_type 0 wants running sums, not {ends}")
    require(ends[-1] <= x[0].shape[0], f"group_list asks for {ends[-1]} rows of {x[0].shape[0]}")
    begin = 0
    for expert, end in enumerate(ends):
        product = x[0][begin:end].float() @ weight[0][expert].float()
        if bias:
            product = product + bias[0][expert].float()
        out[0][begin:end] = product.to(out[0].dtype)
        begin = end


@operator("MoeTokenUnpermute")
def token_unpermute(
    tokens: Tensor, indices: Tensor, probabilities: Tensor | None, padded: bool, shape: Ints | None, out: Tensor
) -> None:
    require(not padded, "padded_mode must be false")
    where = indices.long()
    require(bool(((where >= 0) & (where < tokens.shape[0])).all()), "sorted_indices out of range")
    found = tokens.float()[where].view(out.shape[0], -1, tokens.shape[1])
    if probabilities is not None:
        found = found * probabilities.float()[..., None]
    out.copy_(found.sum(1))
