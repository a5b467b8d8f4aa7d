"""Three ways in, one set of values: TransformerLens and nnsight against the native hooks."""

import dataclasses
import subprocess
import sys
from typing import get_args

import pytest
import torch
from jaxtyping import Int
from torch import Tensor

from probe import backends
from probe.backends import (
    capture,
    make_bridge,
    make_capture,
    make_twin,
    run_edited,
    transformer_lens_name,
)
from probe.capture import site_width
from probe.errors import Failure, UserError
from probe.generation import prompt_tokens
from probe.interventions import Channels, Coordinate, Edit, Where
from probe.language import LanguageModel
from probe.models import load_language_model
from probe.sites import LAYER_KINDS, Site, parse_site
from probe.toy import tiny_gpt2, tiny_llama
from saes.activations import TopK
from saes.constraints import initialise
from saes.models import SaeConfig, SparseAutoencoder
from saes.recipe_saes import Reader

OTHERS = ("transformer_lens", "nnsight")


@pytest.fixture(params=OTHERS)
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.param(n_layers=3)


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    try:
        return load_language_model("smollm2", dtype="float32", device="cpu")
    except Failure as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))


def tokens(seed: int = 0, rows: int = 2, length: int = 9) -> Int[Tensor, "b t"]:
    """Random rows with the end of text, which is also the padding token, inside them."""
    rows_of_ids = torch.randint(
        0, 257, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
    rows_of_ids[0, 3] = 0
    rows_of_ids[-1, -1] = 0
    return rows_of_ids


def largest_difference(these: dict[Site, Tensor], those: dict[Site, Tensor]) -> float:
    """The largest absolute difference, relative to a site's largest value where that exceeds 1."""
    assert list(these) == list(those)
    for site in these:
        assert these[site].shape == those[site].shape, site
        assert these[site].dtype == those[site].dtype, site
    return max(
        ((these[s] - those[s]).abs().max() / those[s].abs().max().clamp(min=1)).item()
        for s in those
    )


def test_every_layer_site_is_the_same(model: LanguageModel, backend: backends.Backend) -> None:
    theirs = capture(model, model.sites(), tokens(), backend=backend)
    ours = capture(model, model.sites(), tokens())
    assert largest_difference(theirs, ours) < (1e-4 if backend == "transformer_lens" else 1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2)])
def test_small_batches(
    model: LanguageModel, backend: backends.Backend, shape: tuple[int, int]
) -> None:
    batch = tokens(rows=shape[0], length=shape[1]) if shape[1] > 3 else torch.full(shape, 5)
    theirs = capture(model, model.sites(), batch, backend=backend)
    assert largest_difference(theirs, capture(model, model.sites(), batch)) < 1e-4


def test_each_site_alone_is_the_same(model: LanguageModel, backend: backends.Backend) -> None:
    for site in model.sites():
        theirs = capture(model, [site], tokens(), backend=backend)
        assert largest_difference(theirs, capture(model, [site], tokens())) < 1e-4, site


def test_a_model_is_wrapped_once_for_many_batches(
    model: LanguageModel, backend: backends.Backend
) -> None:
    sites = [parse_site("resid_post.1"), parse_site("head_out.2")]
    read = make_capture(model, sites, backend)
    for seed in range(3):
        batch = tokens(seed, length=4 + seed)
        assert largest_difference(read(batch), capture(model, sites, batch)) < 1e-4


def test_bfloat16_stays_bfloat16(model: LanguageModel, backend: backends.Backend) -> None:
    model.model.bfloat16()
    theirs = capture(model, model.sites(), tokens(), backend=backend)
    # bfloat16 has 8 bits: three blocks of another order of operations differ by a few of them
    assert largest_difference(theirs, capture(model, model.sites(), tokens())) < 0.05


@pytest.mark.parametrize("tensor", ["", ":input", ":update"])
def test_nnsight_reads_any_module(model: LanguageModel, tensor: str) -> None:
    pytest.importorskip("nnsight")
    assert model.names is not None
    relative = ["", f".{model.names.mlp}", f".{model.names.attention_out}"]
    sites = [parse_site(f"module:{model.names.blocks}.1{path}{tensor}") for path in relative]
    sites.append(parse_site(f"module:{model.names.final_norm}{tensor}"))
    theirs = capture(model, sites, tokens(), backend="nnsight")
    for site, values in capture(model, sites, tokens()).items():
        assert torch.equal(theirs[site], values), site


def test_smollm2_is_the_same(smollm2: LanguageModel, backend: backends.Backend) -> None:
    batch = torch.tensor([[0, 504, 3575, 282, 260, 2240, 314, 253, 1528, 30]])
    sites = [Site(kind=kind, layer=layer) for layer in (0, 12, 29) for kind in LAYER_KINDS]
    theirs = capture(smollm2, sites, batch, backend=backend)
    assert largest_difference(theirs, capture(smollm2, sites, batch)) < 1e-4


def state(model: LanguageModel) -> tuple[dict, dict, int]:
    """A model's module classes, its config, and the number of things hung on its modules."""
    modules = dict(model.model.named_modules())
    hung = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m))
        for m in modules.values()
    )
    return {path: type(m) for path, m in modules.items()}, model.model.config.to_dict(), hung


def test_the_model_stays_as_it_was(model: LanguageModel, backend: backends.Backend) -> None:
    before, logits = state(model), model.run(tokens())
    attention = model.model.config._attn_implementation
    clean = capture(model, model.sites(), tokens())
    capture(model, model.sites(), tokens(), backend=backend)
    assert state(model) == before
    assert model.model.config._attn_implementation == attention
    for site, values in capture(model, model.sites(), tokens()).items():
        assert torch.equal(values, clean[site]), site
    again = model.run(tokens())
    assert logits is not None and again is not None
    assert torch.equal(logits, again)


def test_nothing_is_written_to_the_console(
    model: LanguageModel, backend: backends.Backend, capfd: pytest.CaptureFixture[str]
) -> None:
    capture(model, model.sites(), tokens(), backend=backend)
    assert capfd.readouterr() == ("", "")


def test_a_twin_has_the_models_own_weights(model: LanguageModel) -> None:
    twin = make_twin(model.model)
    pairs = zip(model.model.parameters(), twin.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    theirs = {id(module) for module in twin.modules()}
    assert not theirs & {id(module) for module in model.model.modules()}
    assert twin.config is not model.model.config


def test_a_bridge_reads_changed_weights() -> None:
    pytest.importorskip("transformer_lens")
    model = tiny_llama()
    read = make_capture(model, model.sites(), "transformer_lens")
    with torch.no_grad():
        model.model.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(2)  # type: ignore[operator]
    assert largest_difference(read(tokens()), capture(model, model.sites(), tokens())) < 1e-4


def test_a_bridge_runs_with_raw_weights() -> None:
    pytest.importorskip("transformer_lens")
    model = tiny_gpt2()
    bridge = make_bridge(model)
    assert not bridge.compatibility_mode
    with torch.no_grad():
        theirs = bridge(tokens(), return_type="logits")
        ours = model.run(tokens())
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_transformer_lens_names() -> None:
    names = {str(site): transformer_lens_name(site) for site in tiny_llama().sites()[:6]}
    assert names == {
        "resid_pre.0": "blocks.0.hook_resid_pre",
        "resid_post.0": "blocks.0.hook_resid_post",
        "attn_out.0": "blocks.0.hook_attn_out",
        "mlp_out.0": "blocks.0.hook_mlp_out",
        "mlp_act.0": "blocks.0.mlp.hook_post",
        "head_out.0": "blocks.0.attn.hook_z",
    }
    assert transformer_lens_name(parse_site("resid_post.12")) == "blocks.12.hook_resid_post"


def test_transformer_lens_refuses_module_sites() -> None:
    site = parse_site("module:model.layers.0.mlp")
    with pytest.raises(UserError, match="has no TransformerLens name"):
        transformer_lens_name(site)
    with pytest.raises(UserError, match="has no TransformerLens name"):
        make_capture(tiny_llama(), [site], "transformer_lens")


def test_a_hook_that_means_another_tensor_is_refused() -> None:
    pytest.importorskip("transformer_lens")
    model = tiny_llama()
    assert model.names is not None
    model.names = dataclasses.replace(model.names, attention="input_layernorm")
    message = (
        "site attn_out.1 of tiny-llama is the output of model.layers.1.input_layernorm, and "
        "TransformerLens has another tensor under blocks.1.hook_attn_out; "
        "use the backend native or nnsight."
    )
    with pytest.raises(UserError) as caught:
        make_capture(model, [parse_site("attn_out.1")], "transformer_lens")
    assert str(caught.value) == message
    make_capture(model, [parse_site("resid_post.1")], "transformer_lens")


def test_an_architecture_that_transformer_lens_does_not_know_is_refused() -> None:
    pytest.importorskip("transformer_lens")

    model = tiny_llama()
    model.model.__class__ = type("OwnForCausalLM", (type(model.model),), {})
    with pytest.raises(UserError, match=r"architecture of tiny-llama \(OwnForCausalLM\)"):
        make_capture(model, [parse_site("resid_post.0")], "transformer_lens")


@pytest.mark.parametrize("name", get_args(backends.Backend))
def test_sites_that_are_not_there_are_refused(name: backends.Backend) -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match="whose layers are 0 to 1"):
        make_capture(model, [parse_site("resid_post.2")], name)
    with pytest.raises(UserError, match="names no module"):
        make_capture(model, [parse_site("module:model.nothing")], name)


@pytest.mark.parametrize("name", ["native", "nnsight"])
def test_a_module_that_is_never_called_is_named(name: backends.Backend) -> None:
    if name != "native":
        pytest.importorskip(name)
    model = tiny_llama()
    model.model.get_submodule("model").unused = torch.nn.Linear(2, 2)
    sites = [parse_site("resid_post.1"), parse_site("module:model.unused")]
    with pytest.raises(UserError, match=r"site module:model\.unused was never reached"):
        capture(model, sites, tokens(), backend=name)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match="wanted one of native, transformer_lens, nnsight"):
        backends._maker("baukit")


@pytest.mark.parametrize(
    ("name", "module"),
    [("transformer_lens", "transformer_lens.model_bridge.sources"), ("nnsight", "nnsight")],
)
def test_a_backend_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: backends.Backend, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"with: pip install lorgnette\[backends\]$"):
        make_capture(tiny_llama(), [parse_site("resid_post.0")], name)


def test_importing_the_module_imports_neither_library() -> None:
    code = (
        "import sys, probe.backends;"
        "print({'transformer_lens', 'nnsight', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -------------------------------------------------------------------------------------- changing


def make_edits(model: LanguageModel, site: Site, length: int) -> list[Edit]:
    """An addition along a direction and a scaling of channels, at all tokens but the first."""
    width = site_width(model, site)
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    where = Where(prompt=torch.arange(length) > 0)
    along, few = Coordinate(vector=vector), Channels(start=1, stop=4)
    size = torch.tensor([3.0])
    return [
        Edit(site=site, component=along, op="add", value=size, where=where),
        Edit(site=site, component=few, op="scale", value=size, where=where),
    ]


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_edited_passes_agree(model, backend, kind):
    rows, site = tokens(), parse_site(f"{kind}.1")
    edits = make_edits(model, site, rows.shape[1])
    native = run_edited(model, rows, edits)
    assert (native - run_edited(model, rows, [])).abs().max() > 1
    assert torch.allclose(run_edited(model, rows, edits, backend=backend), native, atol=1e-4)


def test_edits_of_several_sites_in_any_order(model, backend):
    rows = tokens()
    edits = [
        edit
        for name in ("resid_post.2", "mlp_act.0", "head_out.1")
        for edit in make_edits(model, parse_site(name), rows.shape[1])
    ]
    native = run_edited(model, rows, edits)
    assert torch.allclose(run_edited(model, rows, edits, backend=backend), native, atol=1e-4)
    clean = model.run(rows)
    assert clean is not None and torch.equal(run_edited(model, rows, []), clean)


def test_an_update_site_is_edited_through_nnsight(model):
    pytest.importorskip("nnsight")
    names = model.names
    assert names is not None
    site = parse_site(f"module:{names.blocks}.1:update")
    edits = make_edits(model, site, tokens().shape[1])
    native = run_edited(model, tokens(), edits)
    other = run_edited(model, tokens(), edits, backend="nnsight")
    assert torch.allclose(other, native, atol=1e-4)


def test_a_steered_feature_is_the_same_three_ways_on_smollm2(smollm2, backend):
    """A feature of an untrained SAE, set at every token: the SAE is spliced into each way in."""
    sae = SparseAutoencoder(SaeConfig(d_in=smollm2.d_model, d_sae=256, activation=TopK(k=8)))
    generator = torch.Generator().manual_seed(0)
    initialise(sae, torch.randn(64, smollm2.d_model, generator=generator), generator)
    reader = Reader(sae)
    feature = Coordinate(vector=sae.W_dec[3].detach(), read=lambda x: reader.feature(3, x))
    prompt = prompt_tokens(smollm2, "The lighthouse keeper wrote a letter")
    where = Where(prompt=torch.arange(len(prompt)) > 0)
    edit = Edit(
        site=parse_site("resid_post.12"), component=feature, op="set",
        value=torch.tensor([200.0]), where=where,
    )  # fmt: skip
    native = run_edited(smollm2, prompt[None], [edit])
    assert (native - run_edited(smollm2, prompt[None], [])).abs().max() > 1
    other = run_edited(smollm2, prompt[None], [edit], backend=backend)
    assert (other - native).abs().max() < 1e-4 * native.abs().max()
