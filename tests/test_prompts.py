"""Codes of a text and the features ranked over them."""

import pytest
import torch

from probe.capture import capturing
from probe.errors import UserError
from probe.sites import parse_site
from saes.activations import TopK
from saes.constraints import initialise
from saes.models import SaeConfig, SparseAutoencoder
from saes.prompts import PromptCodes, encode_prompt, rank_features, strongest_by_token

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_in=32, d_sae=48, activation=TopK(k=3)))
    initialise(sae, torch.randn(64, 32, generator=generator), generator)
    return sae.requires_grad_(False)


def made(values: list[list[float]], indices: list[list[int]]) -> PromptCodes:
    n = len(values)
    keep = torch.arange(n) > 0
    return PromptCodes(
        texts=tuple("abcdef"[:n]),
        keep=keep,
        values=torch.tensor(values),
        indices=torch.tensor(indices),
        n_cut=0,
    )


CODES = made([[9.0, 0.0], [3.0, 1.0], [2.0, 2.0], [4.0, 0.0]], [[5, 0], [1, 2], [2, 1], [2, 0]])
# tokens 1 to 3:   feature 1: 3, 2, -    feature 2: 1, 2, 4


def test_ranking_by_hand():
    ranked = rank_features(CODES, CODES.keep, by="max", top=5)
    assert [(r.feature, r.max) for r in ranked] == [(2, 4.0), (1, 3.0)]
    assert [r.mean for r in ranked] == pytest.approx([7 / 3, 5 / 3])
    assert [r.frequency for r in ranked] == pytest.approx([1.0, 2 / 3])
    assert [r.feature for r in rank_features(CODES, CODES.keep, by="frequency", top=1)] == [2]


def test_ranking_of_one_token_and_of_ties_by_number():
    third = torch.arange(4) == 2
    assert [r.feature for r in rank_features(CODES, third, by="mean", top=5)] == [1, 2]
    everything = torch.ones(4, dtype=torch.bool)
    assert rank_features(CODES, everything, by="max", top=1)[0].feature == 5


def test_padding_is_no_feature_and_no_tokens_give_nothing():
    assert rank_features(CODES, torch.zeros(4, dtype=torch.bool), by="mean", top=5) == []
    silent = made([[0.0, 0.0]], [[0, 0]])
    assert rank_features(silent, torch.tensor([True]), by="max", top=5) == []


def test_strongest_features_of_each_token():
    codes = made([[1.0, 3.0], [0.0, 0.0], [2.0, 0.0]], [[5, 6], [0, 0], [7, 0]])
    assert strongest_by_token(codes, 1) == [[(6, 3.0)], [], [(7, 2.0)]]
    assert strongest_by_token(codes, 9) == [[(6, 3.0), (5, 1.0)], [], [(7, 2.0)]]


def test_one_feature_on_every_token():
    assert CODES.feature(2).tolist() == [0.0, 1.0, 2.0, 4.0]
    assert CODES.feature(0).tolist() == [0.0] * 4


def test_codes_are_those_of_the_activations_behind_the_separator(llama, sae):
    text = "The gulls <came> home."
    codes = encode_prompt(llama, sae, SITE, text)
    tokens = torch.tensor([[llama.separator_id, *llama.tokenizer(text)["input_ids"]]])
    with torch.no_grad(), capturing(llama, [parse_site(SITE)]) as seen:
        llama.run(tokens)
    expected = sae.encode(seen[parse_site(SITE)][0].float()).dense(48)
    found = torch.stack([codes.feature(feature) for feature in range(48)], dim=1)
    torch.testing.assert_close(found, expected)
    assert "".join(codes.texts[1:]) == text
    assert codes.keep.tolist() == [False] + [True] * len(text)


def test_special_tokens_inside_a_text_are_not_kept(llama, sae):
    codes = encode_prompt(llama, sae, SITE, "a<|endoftext|>b")
    assert codes.keep.tolist() == [False, True, False, True]


def test_long_texts_are_cut_to_what_the_model_can_read(llama, gpt2, sae):
    codes = encode_prompt(gpt2, sae, SITE, "x" * 300)
    assert (len(codes.texts), codes.n_cut) == (256, 45)


def test_an_empty_text_is_told_in_a_sentence(llama, sae):
    with pytest.raises(UserError, match="no text to encode"):
        encode_prompt(llama, sae, SITE, "")
