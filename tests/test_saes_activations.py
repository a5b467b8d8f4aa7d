import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import UserError
from saes.activations import TopK
from saes.selection import top_k
from saes.types import Codes, Loss


def test_top_k_by_hand() -> None:
    pre = torch.tensor([[1.0, -2.0, 3.0, 0.5], [-1.0, -2.0, 4.0, -3.0]])
    codes = top_k(pre, 2)
    # Row 1: 3 and 1 are the largest. Row 2: 4, then -1, which ReLU turns into padding.
    assert codes.values.tolist() == [[3.0, 1.0], [4.0, 0.0]]
    assert codes.indices.tolist() == [[2, 0], [2, 0]]


def test_dense_puts_codes_back_and_padding_adds_nothing() -> None:
    codes = Codes(
        values=torch.tensor([[3.0, 1.0], [4.0, 0.0], [2.0, 0.0]]),
        indices=torch.tensor([[2, 0], [2, 0], [0, 0]]),
    )
    assert codes.dense(4).tolist() == [[1, 0, 3, 0], [0, 0, 4, 0], [2, 0, 0, 0]]


def test_ties_go_to_the_lowest_latent_whatever_the_batch() -> None:
    pre = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 1.0, 1.0, 1.0, 1.0]])
    codes = top_k(pre, 2)
    assert codes.indices.tolist() == [[1, 2], [0, 1]]
    alone = top_k(pre[1:], 2)
    assert alone.indices.tolist() == [[0, 1]]


def test_ties_at_or_below_zero_are_padding() -> None:
    codes = top_k(torch.tensor([[0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]), 2)
    assert codes.values.tolist() == [[0, 0], [0, 0]]
    assert codes.indices.tolist() == [[0, 0], [0, 0]]


def test_k_of_all_latents_is_relu() -> None:
    pre = torch.tensor([[1.0, -2.0, 3.0]])
    assert top_k(pre, 3).dense(3).tolist() == [[1, 0, 3]]


def test_empty_batch() -> None:
    codes = top_k(torch.zeros(0, 5), 2)
    assert codes.values.shape == codes.indices.shape == (0, 2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_agrees_with_a_stable_sort(data: st.DataObject) -> None:
    s = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, s))
    rows = data.draw(
        st.lists(st.lists(st.integers(-3, 3), min_size=s, max_size=s), min_size=1, max_size=4)
    )
    pre = np.array(rows, dtype=np.float32)
    order = np.argsort(-pre, axis=1, kind="stable")[:, :k]
    expected = np.zeros_like(pre)
    np.put_along_axis(
        expected, order, np.maximum(np.take_along_axis(pre, order, axis=1), 0), axis=1
    )
    assert np.array_equal(top_k(torch.from_numpy(pre), k).dense(s).numpy(), expected)


def test_k_below_one_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="k must be at least 1"):
        TopK(k=0)


def test_loss_total_is_the_sum_of_its_terms() -> None:
    terms = {"mse": 0.5, "further": 0.125, "penalty": 1.0, "auxk": 0.25}
    tensors = {name: torch.tensor(value) for name, value in terms.items()}
    assert Loss(errors=torch.zeros(3), **tensors).metrics() == {"loss": 1.875} | terms
