"""Reading and editing with plain hooks, against the forward pass written out by hand."""

from typing import Any

import pytest
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import Gemma2Config, Olmo2Config

from probe.capture import capturing
from probe.errors import UserError
from probe.interventions import editing
from probe.language import LanguageModel
from probe.models import make_random_model
from probe.sites import Site, parse_site
from probe.toy import byte_tokenizer, tiny_gpt2, tiny_llama


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.param(n_layers=3)


def tokens(seed: int = 0, rows: int = 2, length: int = 7) -> Int[Tensor, "b t"]:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model: LanguageModel, names: list[str], batch: Tensor) -> dict[str, Tensor]:
    """The sites' tensors in one pass, by name."""
    sites = [parse_site(name) for name in names]
    with torch.no_grad(), capturing(model, sites) as seen:
        model.run(batch)
    return {str(site): seen[site] for site in sites}


def logits(model: LanguageModel, batch: Tensor) -> Tensor:
    with torch.no_grad():
        result = model.run(batch)
    assert result is not None
    return result


def assert_near(this: Tensor, that: Tensor) -> None:
    torch.testing.assert_close(this, that, atol=1e-6, rtol=1e-6)


def n_hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


def blocks(model: LanguageModel) -> Any:
    assert model.names is not None
    return model.model.get_submodule(model.names.blocks)


def test_residuals_are_the_hidden_states_that_transformers_reports(model: LanguageModel) -> None:
    batch = tokens()
    with torch.no_grad():
        hidden = model.model(batch, output_hidden_states=True).hidden_states
    layers = range(model.n_layers)
    seen = read(
        model, [f"{kind}.{i}" for i in layers for kind in ("resid_pre", "resid_post")], batch
    )
    for layer in layers:
        assert_near(seen[f"resid_pre.{layer}"], hidden[layer])
    for layer in layers[:-1]:
        assert_near(seen[f"resid_post.{layer}"], hidden[layer + 1])
    assert model.names is not None
    # what transformers reports last has gone through the final norm
    norm: Any = model.model.get_submodule(model.names.final_norm)
    last = norm(seen[f"resid_post.{layers[-1]}"])
    assert_near(last, hidden[-1])


def test_attention_and_mlp_add_up_to_the_block(model: LanguageModel) -> None:
    for layer in range(model.n_layers):
        names = [f"{kind}.{layer}" for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        before, attention, mlp, after = read(model, names, tokens()).values()
        assert_near(before + attention + mlp, after)


@pytest.mark.parametrize("architecture", [Gemma2Config, Olmo2Config])
def test_attention_and_mlp_add_up_where_norms_stand_behind_them(architecture: type) -> None:
    config = architecture(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    hub_model = make_random_model(config, 0, torch.float32)
    model = LanguageModel("tiny", hub_model, byte_tokenizer())
    names = [f"{kind}.1" for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    before, attention, mlp, after = read(model, names, tokens()).values()
    assert_near(before + attention + mlp, after)


@pytest.mark.parametrize("layer", [0, 2])
def test_inner_sites_recomputed_by_hand_in_llama(layer: int) -> None:
    model = tiny_llama(n_layers=3)
    kinds = ("resid_pre", "head_out", "attn_out", "mlp_act", "mlp_out")
    before, heads, attention, act, out = read(
        model, [f"{k}.{layer}" for k in kinds], tokens()
    ).values()
    block = blocks(model)[layer]
    assert_near(block.self_attn.o_proj(heads), attention)
    entering = block.post_attention_layernorm(before + attention)
    gated = silu(block.mlp.gate_proj(entering)) * block.mlp.up_proj(entering)
    assert_near(act, gated)
    assert_near(out, block.mlp.down_proj(gated))


def test_inner_sites_recomputed_by_hand_in_gpt2() -> None:
    model = tiny_gpt2()
    kinds = ("resid_pre", "head_out", "attn_out", "mlp_act", "mlp_out")
    before, heads, attention, act, out = read(model, [f"{k}.1" for k in kinds], tokens()).values()
    block = blocks(model)[1]
    # heads by hand: softmax of the masked scores, times the values; 4 heads of width 8
    query, key, value = (
        part.view(2, 7, 4, 8).transpose(1, 2)
        for part in block.attn.c_attn(block.ln_1(before)).split(32, -1)
    )
    scores = query @ key.transpose(-1, -2) / 8**0.5
    masked = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    by_hand = (masked.softmax(-1) @ value).transpose(1, 2).reshape(2, 7, 32)
    assert_near(heads, by_hand)
    assert_near(block.attn.c_proj(heads), attention)
    hidden = gelu(block.mlp.c_fc(block.ln_2(before + attention)), approximate="tanh")
    assert_near(act, hidden)
    assert_near(block.mlp.c_proj(act), out)


def test_several_sites_in_one_pass_equal_one_pass_each(model: LanguageModel) -> None:
    batch = tokens()
    names = [str(site) for site in model.sites()]
    together = read(model, names, batch)
    for name in names:
        assert torch.equal(together[name], read(model, [name], batch)[name]), name


def test_a_site_given_twice_is_read_once(model: LanguageModel) -> None:
    site = parse_site("mlp_out.1")
    with capturing(model, [site, site]) as seen:
        assert model.run(tokens()) is None
        assert n_hooks(model) == 1
    assert list(seen) == [site]


def test_what_is_read_is_detached_and_in_the_models_dtype(model: LanguageModel) -> None:
    model.model.bfloat16()
    for tensor in read(model, [str(site) for site in model.sites()], tokens()).values():
        assert not tensor.requires_grad
        assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 1), (3, 2)])
def test_small_batches(model: LanguageModel, shape: tuple[int, int]) -> None:
    batch = tokens(rows=shape[0], length=shape[1])
    for name, tensor in read(model, [str(site) for site in model.sites()], batch).items():
        assert tensor.shape[:2] == shape, name


def test_module_sites_name_the_same_tensors(model: LanguageModel) -> None:
    assert model.names is not None
    block, mlp = f"{model.names.blocks}.1", f"{model.names.blocks}.1.{model.names.mlp}"
    seen = read(
        model,
        [
            *("resid_pre.1", "resid_post.1", "mlp_out.1"),
            *(f"module:{block}:input", f"module:{block}", f"module:{mlp}"),
            f"module:{block}:update",
        ],
        tokens(),
    )
    assert torch.equal(seen[f"module:{block}:input"], seen["resid_pre.1"])
    assert torch.equal(seen[f"module:{block}"], seen["resid_post.1"])
    assert torch.equal(seen[f"module:{mlp}"], seen["mlp_out.1"])
    update = seen[f"module:{block}:update"]
    assert_near(seen["resid_pre.1"] + update, seen["resid_post.1"])


@pytest.mark.parametrize("name", ["resid_pre.1", "head_out.1", "mlp_act.1", "resid_post.1"])
def test_early_exit_never_calls_the_later_blocks(model: LanguageModel, name: str) -> None:
    called: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: called.append(layer))
        for layer, block in enumerate(blocks(model))
    ]
    batch = tokens()
    with capturing(model, [parse_site(name), parse_site("attn_out.0")]) as seen:
        assert model.run(batch) is None
    assert len(seen) == 2
    # block 1 is left halfway, and its own hook runs before ours only at its output
    assert called == ([0, 1] if name == "resid_post.1" else [0])
    called.clear()
    with capturing(model, [parse_site(name)], early_exit=False) as seen:
        assert model.run(batch) is not None
    assert called == [0, 1, 2]
    for handle in handles:
        handle.remove()


def test_without_early_exit_the_logits_are_those_of_the_bare_model(model: LanguageModel) -> None:
    batch = tokens()
    with torch.no_grad(), capturing(model, model.sites(), early_exit=False) as seen:
        result = model.run(batch)
    assert result is not None
    assert torch.equal(result, model.model(batch).logits)
    assert set(seen) == set(model.sites())


def test_each_pass_of_a_block_replaces_the_last(model: LanguageModel) -> None:
    first, second = tokens(1), tokens(2, rows=3, length=4)
    sites = [parse_site("resid_pre.0"), parse_site("resid_post.1")]
    with torch.no_grad(), capturing(model, sites) as seen:
        model.run(first)
        kept = dict(seen)
        model.run(second)
    for site in sites:
        assert torch.equal(kept[site], read(model, [str(site)], first)[str(site)])
        assert torch.equal(seen[site], read(model, [str(site)], second)[str(site)])


class Broken(RuntimeError):
    """Raised by a module made to fail."""


def break_module(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
    def forward(*args: object, **kwargs: object) -> None:
        raise Broken

    monkeypatch.setattr(module, "forward", forward)


def test_hooks_are_gone_afterwards(model: LanguageModel) -> None:
    batch = tokens()
    with capturing(model, model.sites()):
        assert n_hooks(model) == len(model.sites())
        model.run(batch)
    assert n_hooks(model) == 0
    with editing(model, parse_site("mlp_act.1"), lambda x: x):
        assert n_hooks(model) == 1
        model.run(batch)
    assert n_hooks(model) == 0


def test_hooks_are_gone_after_a_forward_pass_that_raises(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_module(monkeypatch, blocks(model)[2])
    with pytest.raises(Broken), capturing(model, model.sites()):
        model.run(tokens())
    assert n_hooks(model) == 0
    with pytest.raises(Broken), editing(model, parse_site("resid_post.0"), lambda x: 0 * x):
        model.run(tokens())
    assert n_hooks(model) == 0
    monkeypatch.undo()
    assert logits(model, tokens()).isfinite().all()


def test_hooks_are_gone_after_an_edit_that_raises(model: LanguageModel) -> None:
    def change(x: Tensor) -> Tensor:
        raise Broken

    for name in ("resid_pre.1", "resid_post.1"):
        with pytest.raises(Broken), editing(model, parse_site(name), change):
            model.run(tokens())
        assert n_hooks(model) == 0


def test_no_hook_is_left_when_a_site_does_not_exist(model: LanguageModel) -> None:
    absent = [parse_site("resid_post.3"), parse_site("module:nothing.here")]
    for site in absent:
        with pytest.raises(UserError), capturing(model, [parse_site("resid_post.0"), site]):
            pass
        with pytest.raises(UserError), editing(model, site, lambda x: x):
            pass
    assert n_hooks(model) == 0


def test_a_module_that_gives_no_floats_is_refused(model: LanguageModel) -> None:
    path = {"tiny-llama": "model.embed_tokens", "tiny-gpt2": "transformer.wte"}[model.spec]
    with pytest.raises(UserError, match="where a tensor of floats was wanted"):
        read(model, [f"module:{path}:input"], tokens())
    assert n_hooks(model) == 0


def test_an_edit_that_changes_nothing_leaves_every_bit(model: LanguageModel) -> None:
    batch = tokens()
    clean = logits(model, batch)
    for site in model.sites():
        with editing(model, site, lambda x: x):
            assert torch.equal(logits(model, batch), clean), site


def test_an_edit_reaches_its_site_and_nothing_before_it(model: LanguageModel) -> None:
    batch, names = tokens(), [str(site) for site in model.sites()]
    clean = read(model, names, batch)
    order = ("resid_pre", "head_out", "attn_out", "mlp_act", "mlp_out", "resid_post")
    for kind in order:
        with editing(model, parse_site(f"{kind}.1"), lambda x: x + 1):
            changed = read(model, names, batch)
        assert_near(changed[f"{kind}.1"], clean[f"{kind}.1"] + 1)
        before = [f"{k}.0" for k in order] + [f"{k}.1" for k in order[: order.index(kind)]]
        # the block before the edited one ends where the edited one begins
        for name in before:
            assert torch.equal(changed[name], clean[name]), (kind, name)
        assert not torch.equal(changed["resid_post.1"], clean["resid_post.1"])


@pytest.mark.parametrize("kind", ["resid_post", "resid_pre"])
def test_another_runs_residual_gives_the_other_runs_logits(model: LanguageModel, kind: str) -> None:
    this, other = tokens(1), tokens(2)
    for layer in range(model.n_layers):
        name = f"{kind}.{layer}"
        replacement = read(model, [name], other)[name]
        with editing(model, parse_site(name), lambda _, new=replacement: new):
            patched = logits(model, this)
        assert torch.equal(patched, logits(model, other))


def test_silenced_parts_add_nothing() -> None:
    model, batch = tiny_llama(n_layers=3), tokens()
    # Llama's projections have no bias: zero hidden units mean a zero output
    for inner, outer in (("mlp_act.1", "mlp_out.1"), ("head_out.1", "attn_out.1")):
        with editing(model, parse_site(inner), torch.zeros_like):
            assert not read(model, [outer], batch)[outer].any()
    silent = ["attn_out.1", "mlp_out.1"]
    with (
        editing(model, parse_site(silent[0]), torch.zeros_like),
        editing(model, parse_site(silent[1]), torch.zeros_like),
    ):
        seen = read(model, ["resid_pre.1", *silent, "resid_post.1"], batch)
    assert torch.equal(seen["resid_pre.1"], seen["resid_post.1"])


def test_edits_of_one_site_nest_from_the_outside_in(model: LanguageModel) -> None:
    site, batch = parse_site("resid_post.1"), tokens()
    clean = read(model, [str(site)], batch)[str(site)]
    with editing(model, site, lambda x: x + 1), editing(model, site, lambda x: 2 * x):
        seen = read(model, [str(site)], batch)[str(site)]
    assert_near(seen, 2 * (clean + 1))


def test_an_inner_edit_ends_before_the_outer(model: LanguageModel) -> None:
    batch = tokens()
    outer, inner = parse_site("resid_pre.0"), parse_site("mlp_out.2")
    with editing(model, outer, lambda x: x * 0.5):
        alone = logits(model, batch)
        with editing(model, inner, torch.zeros_like):
            both = logits(model, batch)
        assert torch.equal(logits(model, batch), alone)
    assert not torch.equal(both, alone)


def update_site(model: LanguageModel) -> Site:
    assert model.names is not None
    return Site(kind="module", path=f"{model.names.blocks}.1", tensor="update")


def test_a_zero_update_skips_the_module(model: LanguageModel) -> None:
    with editing(model, update_site(model), torch.zeros_like):
        seen = read(model, ["resid_pre.1", "resid_post.1"], tokens())
    assert torch.equal(seen["resid_post.1"], seen["resid_pre.1"])


def test_an_update_is_edited_as_the_difference(model: LanguageModel) -> None:
    batch = tokens()
    clean = read(model, ["resid_pre.1", "resid_post.1"], batch)
    with editing(model, update_site(model), lambda x: 3 * x):
        after = read(model, ["resid_post.1"], batch)["resid_post.1"]
    by_hand = clean["resid_pre.1"] + 3 * (clean["resid_post.1"] - clean["resid_pre.1"])
    assert_near(after, by_hand)
