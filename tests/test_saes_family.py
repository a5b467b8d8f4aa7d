"""Every activation against its definition written densely, and what they have in common."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from probe.errors import Failure, UserError
from probe.loader import TensorSource
from probe.runs import Run
from saes import kernels
from saes.activations import (
    NAMES,
    Activation,
    BatchTopK,
    Gated,
    JumpRelu,
    KSparse,
    Matryoshka,
    Relu,
    TopAfa,
    TopK,
    activation_name,
    short_name,
)
from saes.constraints import fold_scale, initialise
from saes.folder import load_sae, save_sae
from saes.losses import training_loss
from saes.models import SaeConfig, SparseAutoencoder
from saes.training import Job, TrainConfig, fit, follow_threshold
from saes.training_forward import training_forward

D, S, K = 24, 160, 6
FAMILY: dict[str, Activation] = {
    "topk": TopK(k=K),
    "multi_topk": TopK(k=K, multi=True),
    "batch_topk": BatchTopK(k=K),
    "matryoshka": Matryoshka(k=K, prefixes=(10, 50)),
    "top_afa": TopAfa(),
    "top_afa_paper": TopAfa(paper_code=True),
    "jump_relu": JumpRelu(l0=0.01, bandwidth=0.3, start=0.4),
    "gated": Gated(l1=0.05),
    "relu": Relu(l1=0.05),
    "k_sparse": KSparse(k=K, alpha=2.0, k_start=40),
}
NO_DEAD = torch.zeros(0, dtype=torch.long)


def make_sae(activation: Activation, d_sae: int = S) -> SparseAutoencoder:
    """An SAE with nothing at rest: every parameter is moved off its first value."""
    config = SaeConfig(
        d_in=D, d_sae=d_sae, activation=activation, tied=isinstance(activation, KSparse)
    )
    sae = SparseAutoencoder(config)
    generator = torch.Generator().manual_seed(1)
    initialise(sae, torch.randn(64, D, generator=generator), generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec" or config.tied:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        if isinstance(activation, BatchTopK | Matryoshka):
            sae.threshold.fill_(0.7)
    return sae


def rows(n: int, seed: int = 2) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def dense_pre(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Pre-activations (of the gates for Gated), with plain autograd."""
    if sae.config.tied:
        return x @ sae.W_dec.T + sae.b_enc
    bias = sae.b_gate if isinstance(sae.config.activation, Gated) else sae.b_enc
    return (x - sae.b_dec) @ sae.W_enc + bias


def largest(pre: Tensor, k: int) -> Tensor:
    return torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)


def nearest(codes: Tensor, target: Tensor) -> Tensor:
    """Top-AFA's mask by trying every number of entries of every row."""
    mask = torch.zeros_like(codes)
    for i, row in enumerate(codes.detach().double()):
        order = sorted(range(len(row)), key=lambda j, row=row: (-float(row[j]), j))
        positive = [j for j in order if row[j] > 0]
        gaps = []
        for n in range(1, len(positive) + 1):
            norm = math.sqrt(sum(float(row[j]) ** 2 for j in positive[:n]))
            gaps.append(abs(norm - float(target[i].detach())))
        if gaps:
            mask[i, positive[: gaps.index(min(gaps)) + 1]] = 1.0
    return mask


def dense_codes(sae: SparseAutoencoder, x: Tensor, pre: Tensor, *, training: bool) -> Tensor:
    """The code matrix by its definition."""
    match sae.config.activation:
        case TopK(k=k):
            return pre.relu() * largest(pre, k)
        case KSparse() as activation:
            k = activation.k_at(0.25) if training else activation.k_encode
            return pre * largest(pre, k)
        case BatchTopK(k=k) | Matryoshka(k=k) if training:
            return pre.relu() * largest(pre.reshape(1, -1), k * len(pre)).view_as(pre)
        case BatchTopK() | Matryoshka():
            return pre * (pre > sae.threshold)
        case TopAfa():
            target = (x - sae.b_dec).norm(dim=1)
            return pre.relu() * nearest(pre.relu() * sae.W_dec.norm(dim=1), target)
        case JumpRelu():
            return pre * (pre > sae.log_threshold.exp())
        case Gated():
            shared = pre - sae.b_gate
            return (sae.r_mag.exp() * shared + sae.b_mag).relu() * (pre > 0)
        case _:
            return pre.relu()


@pytest.mark.parametrize("name", FAMILY)
def test_codes_and_reconstruction_equal_the_definition(name: str) -> None:
    sae, x = make_sae(FAMILY[name]), rows(31)
    wanted = dense_codes(sae, x, dense_pre(sae, x), training=False)
    output = sae(x)
    torch.testing.assert_close(output.codes.dense(S), wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        output.reconstruction, wanted @ sae.W_dec + sae.b_dec, atol=1e-4, rtol=1e-4
    )
    # Strongest first, and padding names latent 0.
    assert bool((output.codes.values.diff(dim=1) <= 0).all())
    assert not bool(output.codes.indices[output.codes.values == 0].any())


def reference_loss(sae: SparseAutoencoder, x: Tensor, dead: Tensor, variance: float) -> Tensor:
    """All terms of the loss, dense, with autograd alone but for JumpRelu's pseudo-derivatives."""
    pre = dense_pre(sae, x)
    codes = dense_codes(sae, x, pre, training=True)
    activation = sae.config.activation
    if isinstance(activation, JumpRelu):
        codes = straight_through(pre, sae.log_threshold.exp(), activation.bandwidth, jump=True)
    error = x - (codes @ sae.W_dec + sae.b_dec)
    loss = error.square().sum(1).mean() / variance
    match activation:
        case TopK(k=k, multi=True):
            wide = (pre.relu() * largest(pre, 4 * k)) @ sae.W_dec + sae.b_dec
            loss = loss + (x - wide).square().sum(1).mean() / variance / 8
        case Matryoshka(prefixes=prefixes):
            for m in prefixes:
                part = codes[:, :m] @ sae.W_dec[:m] + sae.b_dec
                loss = loss + (x - part).square().sum(1).mean() / variance
        case TopAfa(afa=weight, paper_code=paper_code):
            scaled = codes if paper_code else codes * sae.W_dec.norm(dim=1)
            target = x.norm(dim=1) if paper_code else (x - sae.b_dec).norm(dim=1)
            gaps = (scaled.square().sum(1) + 1e-12).sqrt() - target
            loss = loss + weight * gaps.square().mean() / (variance / D)
        case JumpRelu(l0=weight, bandwidth=bandwidth):
            steps = straight_through(pre.detach(), sae.log_threshold.exp(), bandwidth, jump=False)
            loss = loss + weight * steps.sum(1).mean()
        case Gated(l1=weight):
            by_gates = pre.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
            loss = loss + (x - by_gates).square().sum(1).mean() / variance
            loss = loss + weight * pre.relu().sum(1).mean() / math.sqrt(variance)
        case Relu(l1=weight):
            loss = loss + weight * codes.sum(1).mean() / math.sqrt(variance)
    if len(dead):
        of_dead = pre[:, dead].relu() * largest(pre[:, dead], min(16, len(dead)))
        e = error.detach()
        spread = (e - e.mean(0)).square().sum()
        loss = loss + (e - of_dead @ sae.W_dec[dead]).square().sum() / spread / 32
    return loss


def straight_through(pre: Tensor, threshold: Tensor, bandwidth: float, *, jump: bool) -> Tensor:
    """A value with hand-made derivatives: value + derivative x (parameter - parameter's value)."""
    active = (pre > threshold).float().detach()
    inside = ((pre - threshold).abs() < bandwidth / 2).float().detach()
    moved = threshold - threshold.detach()
    if jump:
        return pre * active - inside * threshold.detach() / bandwidth * moved
    return active - inside / bandwidth * moved


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
@pytest.mark.parametrize("n_dead", [0, 30])
@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_every_gradient_equal_dense_autograd(
    name: str, n_dead: int, dense_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "DENSE_SHARE", dense_share)
    monkeypatch.setattr("saes.models.PRE_BYTES", S * 4 * 10)  # ten rows at a time
    sae, x, variance = make_sae(FAMILY[name]), rows(33), 3.0
    dead = torch.arange(0, 2 * n_dead, 2)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    wanted = torch.autograd.grad(
        reference_loss(sae, x, dead, variance), parameters, allow_unused=True
    )
    output = training_forward(sae, x, dead=dead, k_aux=16, progress=0.25)
    loss = training_loss(output, sae.config.activation, variance=variance, auxk_alpha=1 / 32)
    found = torch.autograd.grad(loss.total, parameters, allow_unused=True)
    for parameter, a, b in zip(names, found, wanted, strict=True):
        assert a is not None and b is not None, parameter
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-4, msg=lambda m, p=parameter: p + m)


def test_batch_top_k_of_all_is_top_k_of_all() -> None:
    # Both keep whatever is positive, as does ReLU.
    x = rows(20)
    outputs = {}
    for activation in (TopK(k=S), BatchTopK(k=S), Relu()):
        sae = make_sae(activation)
        outputs[activation_name(activation)] = training_forward(
            sae, x, dead=NO_DEAD, k_aux=1
        ).reconstruction
    torch.testing.assert_close(outputs["topk"], outputs["batch_topk"], atol=0, rtol=0)
    torch.testing.assert_close(outputs["topk"], outputs["relu"], atol=0, rtol=0)


def test_batch_top_k_by_hand() -> None:
    sae = SparseAutoencoder(SaeConfig(d_in=2, d_sae=3, activation=BatchTopK(k=1)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        sae.W_enc.copy_(sae.W_dec.T)
    # Pre-activations [5, 0, 3] and [1, 1, 1.4]: the two largest of the batch are both of row 0.
    output = training_forward(sae, torch.tensor([[5.0, 0.0], [1.0, 1.0]]), dead=NO_DEAD, k_aux=1)
    torch.testing.assert_close(
        output.reconstruction.detach(), torch.tensor([[6.8, 2.4], [0.0, 0.0]])
    )
    assert output.l0 == 1 and output.smallest == pytest.approx(3.0)
    assert output.fired.tolist() == [True, False, True]
    follow_threshold(sae, output, first=True)
    assert sae.threshold.tolist() == pytest.approx([3.0] * 3)
    # A latent is active outside training where it exceeds the threshold, in any batch.
    assert sae.encode(torch.tensor([[5.0, 0.0], [1.0, 1.0]])).dense(3).tolist() == [
        [5, 0, 0], [0, 0, 0]
    ]  # fmt: skip
    follow_threshold(sae, replace(output, smallest=4.0), first=False)
    assert sae.threshold.tolist() == pytest.approx([3.1] * 3)
    follow_threshold(sae, replace(output, smallest=None), first=False)
    assert sae.threshold.tolist() == pytest.approx([3.1] * 3)


def test_top_afa_by_hand() -> None:
    sae = SparseAutoencoder(SaeConfig(d_in=2, d_sae=4, activation=TopAfa()))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]]))
        sae.W_enc.copy_(sae.W_dec.T)
    # x = [3, 4], of norm 5: codes 3, 4, 5 (latent 2). One entry of 5 hits the target exactly.
    # x = [1, 0]: codes 1, 0, 0.6; the first entry alone has norm 1.
    # x = [0, 0]: nothing is positive.
    codes = sae.encode(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]))
    assert codes.dense(4).tolist() == [[0, 0, 5, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    with torch.no_grad():
        sae.b_dec.copy_(torch.tensor([-2.0, -4.0]))
    # x - b_dec = [3, 4] for x = [1, 0]; the norm that counts is the centred one.
    assert sae.encode(torch.tensor([[1.0, 0.0]])).dense(4).tolist() == [[0, 0, 5, 0]]


def test_multi_top_k_logs_the_narrow_code() -> None:
    sae = make_sae(TopK(k=K, multi=True))
    output = training_forward(sae, rows(9), dead=NO_DEAD, k_aux=1)
    assert output.l0 == K
    torch.testing.assert_close(output.reconstruction, sae(rows(9)).reconstruction)


def test_k_sparse_falls_linearly_and_reads_more_outside_training() -> None:
    activation = KSparse(k=10, alpha=1.5, k_start=50, anneal_share=0.5)
    assert [activation.k_at(p) for p in (0.0, 0.25, 0.5, 1.0)] == [50, 30, 10, 10]
    assert activation.k_encode == 15
    assert KSparse(k=10).k_at(0.0) == 10
    codes = make_sae(FAMILY["k_sparse"]).encode(rows(5))
    assert codes.values.shape == (5, 12)


@pytest.mark.parametrize("name", FAMILY)
def test_awkward_batches(name: str) -> None:
    sae = make_sae(FAMILY[name])
    empty = sae(torch.zeros(0, D))
    assert empty.reconstruction.shape == (0, D) and len(empty.codes.values) == 0
    one = sae(rows(5)[3])
    torch.testing.assert_close(
        one.reconstruction, sae(rows(5)).reconstruction[3], atol=1e-5, rtol=1e-5
    )
    assert bool(sae(torch.zeros(2, D)).reconstruction.isfinite().all())
    with pytest.raises(Failure, match="NaN or infinite"):
        sae.encode(torch.full((2, D), math.nan))
    with pytest.raises(UserError, match="of width 24 and got 3"):
        sae.encode(torch.zeros(2, 3))


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "k_sparse"])
def test_where_nothing_is_positive_nothing_fires_and_training_goes_on(name: str) -> None:
    sae = make_sae(FAMILY[name])
    with torch.no_grad():
        for bias in ("b_enc", "b_gate", "b_mag"):
            if hasattr(sae, bias):
                getattr(sae, bias).fill_(-1e3)
        if name == "top_afa_paper":
            sae.W_enc.zero_()
    x = rows(7)
    assert not bool(sae.encode(x).values.any())
    torch.testing.assert_close(sae(x).reconstruction, sae.b_dec.expand(7, -1))
    output = training_forward(sae, x, dead=NO_DEAD, k_aux=1)
    assert output.l0 == 0 and output.smallest is None and not bool(output.fired.any())
    loss = training_loss(output, sae.config.activation, variance=1.0, auxk_alpha=0.0)
    loss.total.backward()
    assert sae.b_dec.grad is not None and bool(sae.b_dec.grad.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILY)),
    n=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_folding_the_scale_changes_nothing_but_the_units(
    name: str, n: int, scale: float, seed: int
) -> None:
    sae, x = make_sae(FAMILY[name]), rows(n, seed)
    with torch.no_grad():
        wanted = sae(x)
        fold_scale(sae, scale)
        found = sae(x / scale)
    torch.testing.assert_close(
        found.reconstruction * scale, wanted.reconstruction, atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("name", FAMILY)
def test_the_folder_gives_back_the_same_sae(name: str, tmp_path: Path) -> None:
    sae, x = make_sae(FAMILY[name]).requires_grad_(False), rows(8)
    save_sae(sae, tmp_path, metadata={}, golden_x=x)
    again = load_sae(tmp_path)
    assert again.config == sae.config
    torch.testing.assert_close(again(x).reconstruction, sae(x).reconstruction)


@pytest.mark.parametrize("name", FAMILY)
def test_fit_learns_and_a_grid_equals_each_alone(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = functional.normalize(torch.randn(40, D, generator=generator), dim=1)
    strengths = torch.rand(512, 40, generator=generator)
    strengths *= torch.rand(512, 40, generator=generator) < 0.05
    source = TensorSource(strengths @ directions + 0.3, 64)
    configs = {
        "alone": TrainConfig(
            d_sae=S, activation=FAMILY[name], steps=40, lr=5e-3, warmup_steps=2, init_rows=256,
            k_aux=8, dead_after_tokens=512, checkpoint_every=15,
        )
    }  # fmt: skip
    configs["beside"] = configs["alone"]
    configs["other"] = replace(configs["alone"], seed=5)

    def job(folder: str, key: str) -> Job:
        run = Run.create(tmp_path / folder, key, {"kind": "sae", "key": key})
        return Job(run=run, config=configs[key])

    alone = fit([job("a", "alone")], source, progress=False)[0]
    beside = fit([job("b", "beside"), job("b", "other")], source, progress=False)[0]
    for tensor, wanted in zip(beside.tensors().values(), alone.tensors().values(), strict=True):
        assert torch.equal(tensor, wanted)
    summary = job("a", "alone").run.summary
    assert summary["fvu"] < 0.75 and summary["activation"] == activation_name(FAMILY[name])


def test_names_and_mistakes() -> None:
    assert {type(activation) for activation in FAMILY.values()} == set(NAMES.values())
    assert short_name(TopAfa(afa=1 / 32)) == "top_afa0.03125" and short_name(TopK()) == "topk32"
    with pytest.raises(UserError, match="prefixes must be growing"):
        Matryoshka(prefixes=(8, 4))
    with pytest.raises(UserError, match="must be smaller than d_sae"):
        SaeConfig(d_in=4, d_sae=64, activation=Matryoshka(k=4, prefixes=(32, 64)))
    with pytest.raises(UserError, match="afa must be a number of at least 0"):
        TopAfa(afa=math.inf)
    with pytest.raises(UserError, match="k_sparse has a tied encoder"):
        SaeConfig(d_in=4, d_sae=8, activation=TopK(k=1), tied=True)
    with pytest.raises(UserError, match="k_start must be at least k"):
        KSparse(k=10, k_start=5)
    with pytest.raises(UserError, match="bandwidth and start"):
        JumpRelu(bandwidth=0.0)
    with pytest.raises(UserError, match="is made of"):
        SparseAutoencoder.from_tensors(SaeConfig(d_in=4, d_sae=8, activation=Relu()), {})
