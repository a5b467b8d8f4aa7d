"""The grammar of sites: names read back, globs, and the sentences for what is not there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.capture import site_width
from probe.errors import UserError
from probe.sites import GRAMMAR, LAYER_KINDS, Site, expand_sites, parse_site
from probe.toy import tiny_gpt2, tiny_llama

layer_sites = st.builds(Site, kind=st.sampled_from(LAYER_KINDS), layer=st.integers(0, 10_000))
paths = st.lists(st.from_regex(r"[A-Za-z0-9_]{1,8}", fullmatch=True), min_size=1, max_size=5)
module_sites = st.builds(
    Site,
    kind=st.just("module"),
    path=paths.map(".".join),
    tensor=st.sampled_from(["input", "output", "update"]),
)


@given(layer_sites | module_sites)
def test_a_name_reads_back_as_the_same_site(site: Site) -> None:
    assert parse_site(str(site)) == site


@given(layer_sites | module_sites)
def test_a_folder_name_has_no_awkward_character(site: Site) -> None:
    assert not set(site.folder) - set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
    )


def test_parts_of_a_name() -> None:
    assert parse_site("resid_post.12") == Site(kind="resid_post", layer=12)
    assert parse_site("resid_post.007") == Site(kind="resid_post", layer=7)
    update = parse_site("module:model.layers.3.mlp:update")
    assert (update.kind, update.layer) == ("module", None)
    assert (update.path, update.tensor) == ("model.layers.3.mlp", "update")
    assert str(parse_site("module:lm_head:output")) == "module:lm_head"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resid_post",
        "resid_post.",
        "resid_post.-1",
        "resid_post.1.5",
        "resid_post.x",
        "resid_mid.3",
        "module",
        "module:",
        "module::input",
        "module:a:gradient",
        "module:a:input:output",
    ],
)
def test_what_is_not_in_the_grammar_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_site(text)
    assert str(caught.value) == f"site {text!r} is not known: wanted {GRAMMAR}."


@given(st.text())
def test_any_text_is_a_site_or_a_user_error(text: str) -> None:
    try:
        site = parse_site(text)
    except UserError:
        return
    assert parse_site(str(site)) == site


def names(patterns: list[str], n_layers: int = 3) -> list[str]:
    """What the patterns stand for in a small model."""
    return [str(site) for site in expand_sites(patterns, tiny_llama(n_layers=n_layers).sites())]


def test_globs_stand_for_the_sites_they_match() -> None:
    assert names(["resid_post.*"]) == ["resid_post.0", "resid_post.1", "resid_post.2"]
    assert names(["*.1"]) == [f"{kind}.1" for kind in LAYER_KINDS]
    assert names(["resid_p*.[02]"]) == [
        "resid_pre.0",
        "resid_post.0",
        "resid_pre.2",
        "resid_post.2",
    ]
    assert names(["mlp_???.2"]) == ["mlp_out.2", "mlp_act.2"]
    assert len(names(["*"])) == 3 * len(LAYER_KINDS)


def test_sites_come_in_the_order_given_without_repeats() -> None:
    assert names(["resid_post.2", "resid_post.0"]) == ["resid_post.2", "resid_post.0"]
    assert names(["resid_post.2", "resid_post.*"]) == [
        "resid_post.2",
        "resid_post.0",
        "resid_post.1",
    ]


def test_module_names_pass_unchecked_beside_layer_sites() -> None:
    assert names(["module:lm_head", "mlp_act.0", "module:model.norm:input"]) == [
        "module:lm_head",
        "mlp_act.0",
        "module:model.norm:input",
    ]


def test_two_spellings_of_a_module_are_one_site() -> None:
    assert names(["module:lm_head", "module:lm_head:output"]) == ["module:lm_head"]


def test_a_model_without_layer_sites_says_what_to_use() -> None:
    with pytest.raises(UserError, match="any module:<dotted path>"):
        expand_sites(["resid_post.0"], [])


def test_a_pattern_that_matches_nothing_says_what_there_is() -> None:
    with pytest.raises(
        UserError, match=r"'resid_post\.3' is not in this model, which has resid_pr"
    ):
        names(["resid_post.3"])
    with pytest.raises(UserError, match=r"'resid_post\.1\?' is not in this model"):
        names(["resid_post.1?"])
    with pytest.raises(UserError, match="is not known: wanted resid_pre"):
        names(["residual.*"])
    with pytest.raises(UserError, match="no site was given"):
        names([])


def test_a_model_lists_its_sites_layer_by_layer() -> None:
    sites = tiny_gpt2(n_layers=2).sites()
    assert [str(site) for site in sites] == [f"{kind}.{i}" for i in (0, 1) for kind in LAYER_KINDS]


def test_widths_are_those_of_the_tensors() -> None:
    # d_model 32, an MLP three times as wide, four heads of 8
    model = tiny_llama()
    widths = {site.kind: site_width(model, site) for site in model.sites() if site.layer == 1}
    assert widths.pop("mlp_act") == 96
    assert set(widths.values()) == {32}
    assert site_width(tiny_gpt2(), parse_site("mlp_act.0")) == 128
    assert site_width(model, parse_site("module:lm_head")) == 257


def test_unknown_layers_and_modules_are_named_in_a_sentence() -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match=r"resid_post\.2 is not in tiny-llama, whose layers are 0"):
        model.hook_point(parse_site("resid_post.2"))
    with pytest.raises(UserError, match=r"names no module of tiny-llama .*: model, lm_head\."):
        model.hook_point(parse_site("module:model.layers.0.mlpp"))
