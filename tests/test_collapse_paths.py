"""Path sums against enumeration, and gradients against finite differences."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses.collapse.paths import (
    path_sums,
    rank_correlation,
    sensitivities,
    through_head,
    without_empty_start,
    without_first,
)
from analyses.collapse.theory import causal_uniform, path_count, residual_power
from probe.attention import Visible, attention_weights
from probe.toy import tiny_gpt2, tiny_llama

TOKENS = torch.tensor([0, 12, 80, 81, 80, 9, 9])


def random_attention(layers: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, n, n, generator=generator, dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def enumerated(attention: torch.Tensor, beta: float, first_layer: int) -> torch.Tensor:
    """Theorem B.5's sum, path by path."""
    layers, n, _ = attention.shape
    weights = attention / beta + torch.eye(n, dtype=torch.float64)
    sums = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        for middle in itertools.product(range(n), repeat=layers - first_layer - 1):
            path = (i, *middle, n - 1)
            product = 1.0
            for step, (a, b) in enumerate(itertools.pairwise(path)):
                product *= float(weights[first_layer + step][b, a])
            sums[i] += product
    return sums


@given(st.integers(1, 3), st.integers(1, 4), st.floats(0.5, 20), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_path_sums_are_those_of_enumeration(layers, n, beta, seed):
    attention = random_attention(layers, n, seed)
    rows = path_sums(attention, beta)
    assert rows.shape == (layers + 1, n)
    for depth in range(layers):
        wanted = enumerated(attention, beta, depth)
        torch.testing.assert_close(rows[depth], wanted / wanted.sum())
    assert rows[layers].tolist() == [0.0] * (n - 1) + [1.0]


@given(st.integers(1, 3), st.integers(1, 5), st.floats(0.5, 4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_theorem_b5_bounds_the_jacobian(layers, n, beta, seed):
    """With attention held constant and norms as divisors, every token's Jacobian is below it."""
    generator, d = torch.Generator().manual_seed(seed), 4
    attention = random_attention(layers, n, seed)
    maps = torch.randn(layers, d, d, generator=generator, dtype=torch.float64)

    def last(v: torch.Tensor) -> torch.Tensor:
        for weights, psi in zip(attention, maps, strict=True):
            z = weights @ (v / beta) + v
            v = torch.tanh((z / beta) @ psi) + z
        return v[-1] / beta

    v = torch.randn(n, d, generator=generator, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(last, v)
    assert isinstance(jacobian, torch.Tensor)
    norms = torch.linalg.matrix_norm(jacobian.movedim(1, 0), ord=2)
    sigma = torch.linalg.matrix_norm(maps, ord=2)
    constant = (sigma / beta + 1).prod() / beta * (1 / beta + 1) ** layers
    assert bool((norms <= constant * path_sums(attention, beta)[0] + 1e-9).all())


def test_a_divisor_for_each_layer():
    attention = random_attention(2, 4)
    rows = path_sums(attention, torch.tensor([2.0, 5.0]))
    eye = torch.eye(4, dtype=torch.float64)
    wanted = ((attention[1] / 5 + eye) @ (attention[0] / 2 + eye))[-1]
    torch.testing.assert_close(rows[0], wanted / wanted.sum())


def test_the_published_scaling_is_that_of_proposition_b8():
    attention = causal_uniform(6)
    torch.testing.assert_close(
        path_sums(attention.expand(9, -1, -1), 1.0)[0], residual_power(attention, 9)
    )


def test_weights_of_one_count_the_paths():
    ones = torch.ones(3, 5, 5, dtype=torch.float64).tril() - torch.eye(5, dtype=torch.float64)
    counts = torch.tensor([path_count(5, i, 3) for i in range(1, 6)], dtype=torch.float64)
    torch.testing.assert_close(path_sums(ones, 1.0)[0], counts / counts.sum())


def test_without_the_first_token_rows_still_sum_to_one():
    attention = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]])
    wanted = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0.5]])
    torch.testing.assert_close(without_first(attention), wanted)


def test_what_passes_the_heads_is_the_mean_of_them():
    by_head = torch.stack([random_attention(2, 4, seed) for seed in range(3)], dim=1).float()
    rows = path_sums(by_head.mean(1), 1.0)
    passing = through_head(rows, by_head)
    assert passing.shape == (2, 3, 4)
    wanted = rows[1].float() @ by_head[0].mean(0)
    torch.testing.assert_close(passing[0].mean(0), wanted)


def jacobian_norms(model, depth: int) -> torch.Tensor:
    """Finite differences of the final norm's last output by the stream entering a layer."""
    step, inner, norms = 1e-5, model.model.double(), []
    blocks = inner.model.layers if hasattr(inner, "model") else inner.transformer.h
    norm = inner.model.norm if hasattr(inner, "model") else inner.transformer.ln_f

    def final(delta: torch.Tensor) -> torch.Tensor:
        kept = []
        hooks = [
            blocks[depth].register_forward_pre_hook(lambda _, args: (args[0] + delta, *args[1:])),
            norm.register_forward_hook(lambda *seen: kept.append(seen[2])),
        ]
        with torch.no_grad():
            inner(input_ids=TOKENS[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        return kept[0][0, -1]

    width = model.d_model
    for token in range(len(TOKENS)):
        columns = []
        for channel in range(width):
            delta = torch.zeros(1, len(TOKENS), width, dtype=torch.float64)
            delta[0, token, channel] = step
            columns.append((final(delta) - final(-delta)) / (2 * step))
        norms.append(torch.stack(columns).norm())
    return torch.stack(norms)


@pytest.mark.parametrize("depth", [0, 1])
def test_sensitivities_against_finite_differences(depth):
    # GPT-2, whose norms keep float64: differences of 1e-5 are then exact to many digits.
    model = tiny_gpt2(d_model=16)
    wanted = jacobian_norms(model, depth)
    found = sensitivities(model, TOKENS, probes=4000)[depth]
    torch.testing.assert_close(found, wanted, rtol=0.08, atol=1e-6)


def test_projections_give_the_norm_of_the_whole_jacobian():
    model = tiny_llama(d_model=16)
    x = model.model.model.embed_tokens(TOKENS[None]).detach()

    def output(embedded):
        return model.model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, -1]

    jacobian = torch.autograd.functional.jacobian(output, x)
    assert isinstance(jacobian, torch.Tensor)
    exact = jacobian[:, 0].double().square().sum((0, 2)).sqrt()
    found = sensitivities(model, TOKENS, probes=2000)[0]
    torch.testing.assert_close(found, exact, rtol=0.08, atol=1e-6)


def test_a_first_token_that_is_nothing_is_left_out():
    model = tiny_llama()  # its padding token is token 0, whose vector is zero
    assert torch.equal(without_empty_start(model, TOKENS), TOKENS[1:])
    assert torch.equal(without_empty_start(model, TOKENS[1:]), TOKENS[1:])
    assert torch.isfinite(sensitivities(model, TOKENS[1:], probes=2)).all()


def test_a_token_outside_the_window_is_not_felt():
    model = tiny_llama()
    found = sensitivities(model, TOKENS, probes=4, visible=Visible(window=2))
    # Two layers of a window of two reach back two tokens.
    assert float(found[0, :4].max()) == 0 < float(found[0, 4:].min())
    frozen = sensitivities(model, TOKENS, probes=4, frozen=True)
    assert frozen.shape == (3, 7) and not torch.allclose(
        frozen[0], sensitivities(model, TOKENS, probes=4)[0]
    )
    assert float(frozen[2, :-1].max()) == 0, "behind the last layer only the last token counts"


def test_path_sums_of_a_model_vanish_where_its_gradient_does():
    model = tiny_llama()
    visible = Visible(window=2)
    attention = attention_weights(model, TOKENS, visible=visible).mean(1)
    assert (path_sums(attention)[0] > 0).tolist() == [False] * 4 + [True] * 3


def test_rank_correlation_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0])
    assert rank_correlation(a, torch.tensor([10.0, 20.0, 30.0])) == pytest.approx(1)
    assert rank_correlation(a, torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(-1)
