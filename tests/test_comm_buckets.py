"""Buckets hold every parameter once, in order, within their limit."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from gradsync.comm.buckets import bounded_layout, ddp_layout, make_buckets
from gradsync.comm.server.layout import Layout, flat_alias


def _parameters() -> list[torch.Tensor]:
    shapes = [(3, 5), (1,), (1000,), (7, 2, 3, 3), (1,), (64, 64)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    parameters[3] = torch.nn.Parameter(parameters[3].detach().to(memory_format=torch.channels_last))
    return [*parameters, torch.nn.Parameter(torch.randn(9, dtype=torch.float64))]


@pytest.mark.parametrize("bucket_mib", [1e-6, 0.002, 1.0])
def test_every_parameter_is_in_one_bucket_in_order(bucket_mib: float) -> None:
    parameters = _parameters()
    buckets = make_buckets(bounded_layout(parameters, int(bucket_mib * 2**20)))
    assert [id(p) for b in buckets for p in b.parameters()] == [id(p) for p in parameters]
    assert [b.index() for b in buckets] == list(range(len(buckets)))
    assert [b.is_last() for b in buckets] == [False] * (len(buckets) - 1) + [True]
    for bucket in buckets:
        assert len({p.dtype for p in bucket.parameters()}) == 1
        assert len(bucket.parameters()) == 1 or bucket.num_bytes <= bucket_mib * 2**20


@pytest.mark.parametrize("limits", [[1], [4000], [100, 4000], [sys.maxsize]])
def test_the_layout_is_ddps(limits: list[int]) -> None:
    parameters = [p for p in _parameters() if p.dtype == torch.float32]
    theirs, _ = dist._compute_bucket_assignment_by_size(parameters, limits)
    ours = ddp_layout(parameters, limits[-1], limits[0])
    assert [[id(p) for p in run] for run in ours] == [[id(parameters[i]) for i in run] for run in theirs]


def test_a_view_has_its_parameters_shape_and_strides_and_lives_in_the_buffer() -> None:
    for bucket in make_buckets(bounded_layout(_parameters(), 2**20)):
        for parameter, view, part in zip(bucket.parameters(), bucket.gradients(), bucket.slices, strict=True):
            assert (view.shape, view.stride(), view.dtype) == (parameter.shape, parameter.stride(), parameter.dtype)
            view.fill_(7)
            assert bool((part == 7).all())


@pytest.mark.parametrize("part_mib", [1e-5, 0.001, 4.0])
def test_parts_cover_every_bucket_once(part_mib: float) -> None:
    layout = Layout(_parameters(), part_mib)
    for bucket in layout.buckets:
        parts = layout.parts(bucket)
        assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == bucket.buffer().numel()


def test_frozen_parameters_do_not_travel() -> None:
    parameters = _parameters()
    parameters[2].requires_grad_(False)
    assert all(p is not parameters[2] for b in Layout(parameters, 1.0).buckets for p in b.parameters())


def test_flat_alias_shares_memory_or_refuses() -> None:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    alias = flat_alias(image, image)
    assert alias is not None
    alias.zero_()
    assert not image.any()
    assert flat_alias(image.contiguous(), image) is None
    assert flat_alias(torch.randn(4, 8)[:, ::2], torch.randn(4, 8)[:, ::2]) is None
