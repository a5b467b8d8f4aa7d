"""What features contribute to a prediction: estimate and measurement; texts and chats as tokens."""

import numpy as np
import pytest
import torch
from scipy import stats

from probe.capture import capturing
from probe.errors import UserError
from probe.interventions import editing
from probe.language import LanguageModel
from probe.readout import Metric, last_logits, predicted, site_gradient, token_metric
from probe.sites import parse_site
from probe.tokens import Turn, one_token, read_chat, read_text
from saes.activations import TopK
from saes.attribution import Attribution, ablate, attribute, compare
from saes.constraints import initialise
from saes.models import Normalize, SaeConfig, SparseAutoencoder

TEXT = "The gulls came home."
SITES = ("resid_post.0", "resid_pre.1", "mlp_out.0", "module:model.layers.0:update")
METRIC = Metric(target=70, contrast=101)


def make_sae(normalize: Normalize = "none") -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_in=32, d_sae=48, activation=TopK(k=3), normalize=normalize))
    initialise(sae, torch.randn(64, 32, generator=generator), generator)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    return make_sae()


def metric_with(model: LanguageModel, site: str, shift: torch.Tensor, metric: Metric) -> float:
    """The metric of one plain forward pass with `shift [t, d]` added at the site."""
    tokens = read_text(model, TEXT).tokens
    with torch.no_grad(), editing(model, parse_site(site), lambda x: x + shift):
        logits = model.run(tokens)
    assert logits is not None
    return float(metric.of(logits[:, -1].float())[0])


def entry(found: Attribution, row: int) -> tuple[int, int, float, float]:
    """Feature, position, activation and attribution of a row of the table."""
    line = found.by_token().iloc[row]
    return tuple(line[["feature", "position", "activation", "attribution"]])


def shift_of(sae: SparseAutoencoder, feature: int, position: int, amount: float, n: int):
    shift = torch.zeros(n, sae.config.d_in)
    shift[position] = amount * sae.W_dec[feature]
    return shift


@pytest.mark.parametrize("site", SITES)
def test_attribution_is_the_slope_of_the_metric(llama, sae, site):
    found = attribute(llama, sae, site, TEXT, METRIC)
    n = len(found.prompt)
    assert found.value == pytest.approx(metric_with(llama, site, torch.zeros(n, 32), METRIC))
    for row in range(4):
        feature, position, activation, attribution = entry(found, row)
        step = 1e-2
        up, down = (
            metric_with(llama, site, shift_of(sae, feature, position, sign * step, n), METRIC)
            for sign in (1, -1)
        )
        slope = activation * (up - down) / (2 * step)
        assert attribution == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_exact_where_the_metric_is_linear_in_the_site(sae):
    """Attention and norms out of the way: what is written into the last MLP's output is read by a
    linear unembedding."""
    from probe.toy import tiny_gpt2

    model = tiny_gpt2()
    model.model.get_submodule("transformer").ln_f = torch.nn.Identity()
    found = attribute(model, sae, "mlp_out.1", TEXT, METRIC)
    done = ablate(model, sae, found, top=3)
    np.testing.assert_allclose(done.table["ablation"], done.table["attribution"], rtol=1e-3)
    head = model.model.lm_head.weight
    direction = head[METRIC.target] - head[METRIC.contrast]
    feature, position, activation, attribution = entry(found, 0)
    assert position == len(found.prompt) - 1
    assert attribution == pytest.approx(
        activation * float((sae.W_dec[feature] @ direction).detach()), 1e-4
    )


@pytest.mark.parametrize("site", [*SITES, "module:model.layers.0.mlp"])
def test_true_ablation_is_a_loop_of_single_passes(llama, sae, site):
    found = attribute(llama, sae, site, TEXT, METRIC)
    done = ablate(llama, sae, found, top=5)
    n = len(found.prompt)
    whole = metric_with(llama, site, torch.zeros(n, 32), METRIC)
    for row in done.table.to_dict("records"):
        shift = shift_of(sae, row["feature"], row["position"], -row["activation"], n)
        assert row["ablation"] == pytest.approx(
            whole - metric_with(llama, site, shift, METRIC), abs=1e-4
        )


def test_everywhere_takes_the_feature_out_of_all_tokens_that_count(gpt2, sae):
    found = attribute(gpt2, sae, "resid_post.0", TEXT, METRIC)
    done = ablate(gpt2, sae, found, top=6, where="everywhere")
    n = len(found.prompt)
    whole = metric_with(gpt2, "resid_post.0", torch.zeros(n, 32), METRIC)
    for row in done.table.to_dict("records"):
        codes = (found.values * (found.indices == row["feature"])).sum(-1)
        codes[0] = 0
        assert row["n_tokens"] == int((codes != 0).sum())
        shift = -codes[:, None] * sae.W_dec[row["feature"]]
        assert row["ablation"] == pytest.approx(
            whole - metric_with(gpt2, "resid_post.0", shift, METRIC), abs=1e-4
        )


def test_sums_by_feature_and_totals_by_hand(sae):
    found = Attribution(
        prompt=read_text_like(("^", "a", "b")),
        site="resid_post.0",
        metric=METRIC,
        value=1.0,
        values=torch.tensor([[9.0, 1.0], [2.0, 1.0], [4.0, 0.0]]),
        indices=torch.tensor([[5, 1], [1, 2], [1, 0]]),
        effects=torch.tensor([[7.0, 1.0], [-3.0, 2.0], [0.5, 0.0]]),
        scale=torch.ones(3),
        error=torch.tensor([100.0, 0.25, 0.5]),
    )
    by_token = found.by_token()
    assert by_token["feature"].tolist() == [1, 2, 1]
    assert by_token["token"].tolist() == ["a", "a", "b"]
    by_feature = found.by_feature()
    assert by_feature["feature"].tolist() == [1, 2]
    assert by_feature["attribution"].tolist() == [-2.5, 2.0]
    assert by_feature["n_tokens"].tolist() == [2, 1]
    assert by_feature["activation"].tolist() == [2.0, 1.0]
    assert found.by_feature(1)["feature"].tolist() == [1]
    assert found.total() == {"features": -0.5, "error": 0.75}


def read_text_like(texts: tuple[str, ...]):
    from probe.tokens import Prompt

    n = len(texts)
    return Prompt(ids=tuple(range(n)), texts=texts, keep=(False, *[True] * (n - 1)))


def test_features_and_error_and_bias_make_up_the_whole(llama, sae):
    """The error term is kept: x = sum of features + bias + error, all of it accounted for."""
    found = attribute(llama, sae, "resid_post.0", TEXT, METRIC)
    gradient = site_gradient(llama, parse_site("resid_post.0"), found.prompt, METRIC)
    whole = (gradient.x * gradient.gradient).sum(-1)
    bias = gradient.gradient @ sae.b_dec
    torch.testing.assert_close(found.effects.sum(-1) + found.error + bias, whole)


def test_nothing_taken_out_changes_nothing(llama, sae):
    site, prompt = parse_site("resid_post.0"), read_text(llama, TEXT)
    with torch.no_grad(), capturing(llama, [site], early_exit=False) as seen:
        logits = llama.run(prompt.tokens)
    assert logits is not None
    gradient = site_gradient(llama, site, prompt, METRIC)
    assert torch.equal(gradient.x, seen[site][0])
    assert gradient.value == pytest.approx(float(METRIC.of(logits[:, -1])[0]), abs=1e-5)


def test_normalised_inputs_scale_their_features(llama):
    sae = make_sae(normalize="layer_norm")
    found = attribute(llama, sae, "resid_post.0", TEXT, METRIC)
    done = ablate(llama, sae, found, top=2)
    with torch.no_grad(), capturing(llama, [parse_site("resid_post.0")]) as seen:
        llama.run(found.prompt.tokens)
    x = seen[parse_site("resid_post.0")][0]
    row = done.table.iloc[0]
    amount = -row["activation"] * float(x[row["position"]].std())
    n = len(found.prompt)
    shift = shift_of(sae, row["feature"], row["position"], amount, n)
    whole = metric_with(llama, "resid_post.0", torch.zeros(n, 32), METRIC)
    expected = whole - metric_with(llama, "resid_post.0", shift, METRIC)
    assert row["ablation"] == pytest.approx(expected, abs=1e-4)


def test_the_metric_without_a_contrast_is_the_logit_over_the_mean_one(llama):
    prompt = read_text(llama, TEXT)
    logits = last_logits(llama, prompt.tokens).detach()
    whole = llama.run(prompt.tokens)
    assert whole is not None
    torch.testing.assert_close(logits, whole[:, -1].detach())
    assert float(Metric(target=3).of(logits)[0]) == pytest.approx(
        float(logits[0, 3] - logits[0].mean())
    )
    torch.testing.assert_close(predicted(llama, prompt), logits[0].log_softmax(-1))


def test_by_default_the_predicted_token_is_explained(llama, sae):
    found = attribute(llama, sae, "resid_post.0", TEXT)
    assert found.metric == Metric(target=int(predicted(llama, found.prompt).argmax()))
    assert "minus mean logit" in found.metric.named(llama)


def test_an_earlier_position_is_a_shorter_text(llama, sae):
    whole = attribute(llama, sae, "resid_post.0", TEXT, METRIC, position=5)
    short = attribute(llama, sae, "resid_post.0", TEXT[:5], METRIC)
    torch.testing.assert_close(whole.effects, short.effects)


def test_bfloat16_models_are_attributed_too(sae):
    from probe.toy import tiny_llama

    reduced = tiny_llama()
    reduced.model.bfloat16()
    found = attribute(reduced, sae, "resid_post.0", TEXT, METRIC)
    exact = attribute(tiny_llama(), sae, "resid_post.0", TEXT, METRIC)
    assert found.value == pytest.approx(exact.value, abs=0.1)
    assert found.effects.dtype == torch.float32
    assert np.isfinite(ablate(reduced, sae, found, top=3).table["ablation"]).all()


def test_agreement_against_scipy_with_interval_and_control():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = x + 0.3 * rng.normal(size=30)
    found = compare(x, y)
    assert found.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0])
    assert found.largest_difference == pytest.approx(np.abs(x - y).max())
    assert found.low is not None and found.high is not None
    assert found.pearson is not None and found.shuffled is not None
    assert found.low < found.pearson < found.high and found.shuffled < 0.5


@pytest.mark.parametrize("pairs", [[], [(1.0, 2.0)], [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]])
def test_agreement_of_too_little_is_none(pairs):
    x, y = np.array(pairs).reshape(-1, 2).T
    found = compare(x, y)
    assert found.pearson is None and found.n == len(pairs)


def test_a_text_on_which_nothing_counts_gives_empty_tables(llama, sae):
    found = attribute(llama, sae, "resid_post.0", "<|endoftext|>", METRIC)
    assert found.by_token().empty and found.by_feature().empty
    assert ablate(llama, sae, found).table.empty


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text": ""}, "no text"),
        ({"text": "x" * 300}, "reads at most 256"),
        ({"site": "resid_post.7"}, "layers are 0 to 1"),
        ({"position": 99}, "no position 99"),
        ({"metric": Metric(target=999)}, "tokens 0 to 256"),
    ],
)
def test_wrong_questions_are_told_in_a_sentence(llama, sae, change, sentence):
    asked = {"text": TEXT, "site": "resid_post.0", "metric": METRIC, "position": None} | change
    with pytest.raises(UserError, match=sentence):
        attribute(
            llama, sae, asked["site"], asked["text"], asked["metric"], position=asked["position"]
        )


def test_a_word_of_several_tokens_is_told_in_a_sentence(llama):
    assert one_token(llama, "a") == token_metric(llama, "a").target
    with pytest.raises(UserError, match=r"' Mary' is 5 tokens"):
        token_metric(llama, " Mary")
    with pytest.raises(UserError, match="is empty"):
        one_token(llama, "")


# ------------------------------------------------------------------------------------------ chats

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last or "
    "add_generation_prompt %}|{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)


@pytest.fixture
def talker():
    from probe.toy import tiny_llama

    model = tiny_llama()
    model.tokenizer.chat_template = TEMPLATE
    return model


def test_a_chat_is_written_by_the_template(talker):
    turns = [Turn(role="system", content=" "), Turn(role="user", content="Hi")]
    prompt = read_chat(talker, turns)
    assert "".join(prompt.texts) == "<user>Hi|<assistant>"
    assert prompt.keep == (False, *[True] * (len(prompt) - 1))


def test_an_answer_that_has_begun_is_left_open(talker):
    turns = [Turn(role="user", content="Hi"), Turn(role="assistant", content="Well")]
    assert "".join(read_chat(talker, turns).texts) == "<user>Hi|<assistant>Well"


def test_chats_that_cannot_be_are_told_in_a_sentence(talker, llama):
    said = [Turn(role="user", content="Hi")]
    with pytest.raises(UserError, match="no chat template"):
        read_chat(llama, said)
    with pytest.raises(UserError, match="no turn with text"):
        read_chat(talker, [Turn(role="user", content="")])
    talker.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(UserError, match="no system turn"):
        read_chat(talker, said)


def test_long_chats_are_cut_where_that_is_asked_for(talker):
    prompt = read_chat(talker, [Turn(role="user", content="x" * 50)], at_most=20)
    assert len(prompt) == 20 and prompt.n_cut == 6 + 50 + 1 + 11 - 20
