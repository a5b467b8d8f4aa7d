"""Memory and time on paper, against sums by hand and against a real state."""

import functools

import pytest
import torch

from saes.activations import TopK
from saes.footprint import Rates, footprint, table
from saes.training import TrainConfig, fresh_state


def test_one_process_by_hand():
    found = footprint(d=4, m=10, k=2, b=6, reduced=False)
    assert found.parameters == 2 * 4 * 10 + 10 + 4 == 94
    assert found.state_bytes == 16 * 94
    assert found.activation_bytes == 6 * 4 * 6 * 4 + 48 * 12  # 12 entries
    assert found.flops == 2 * 6 * 4 * 10
    assert found.moved_bytes == 4 * 4 * 4 * 12 + 45 * 94 and found.exchanged_bytes == 0
    rates = Rates(flops=480.0, memory=float(found.moved_bytes), exchange=1.0)
    assert found.seconds(rates) == 2.0


def test_parameters_are_those_of_a_state():
    state = fresh_state(TrainConfig(d_sae=10, activation=TopK(k=2)), torch.randn(50, 4), "cpu")
    numel = sum(parameter.numel() for parameter in state.parameters.values())
    assert footprint(d=4, m=10, k=2, b=6).parameters == numel


def test_rows_and_latents_divided_by_hand():
    rows = footprint(d=4, m=10, k=2, b=6, ranks=2)
    assert rows.state_bytes == 16 * 94 + 2 * 4 * 10  # and the encoder in bfloat16
    assert rows.flops == 2 * 3 * 4 * 10
    assert rows.exchanged_bytes == 8 * 9 * 10 // 2  # all ten latents may be touched
    latents = footprint(d=4, m=10, k=2, b=6, ranks=2, sharded=True)
    assert latents.parameters == 2 * 4 * 5 + 5 + 4
    assert latents.flops == 2 * 6 * 4 * 5
    assert latents.exchanged_bytes == 4 * 6 * (2 * 1 + 2 * 4 // 2)  # two values, and one sum


def test_a_million_latents_need_the_latents_divided():
    of_size = functools.partial(footprint, d=4096, m=2**20, k=32, b=8192)
    assert of_size().memory_bytes > 140e9
    assert of_size(ranks=8).memory_bytes > 140e9
    assert of_size(ranks=8, sharded=True).memory_bytes == pytest.approx(19.1e9, rel=0.01)
    assert "| 4096 | 1,048,576 | 8.59 G | 146.9 GB, 340 ms |" in table()
