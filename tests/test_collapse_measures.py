"""The measures of the collapse study against slow loops and hand-computed numbers."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from collapse_tree import long_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from analyses.cells import Frame
from analyses.collapse.behaviour import (
    PAIRS,
    STEM,
    Asked,
    copying_frame,
    counting,
    elements,
    first_number,
    margins,
)
from analyses.collapse.curves import (
    Condition,
    by_head,
    curve,
    final_site,
    lengths_up_to,
    longest_that_fits,
    relative,
)
from analyses.collapse.families import FAMILIES, find_family
from analyses.collapse.features import Values, counters, telling
from analyses.collapse.precision import equal_from, in_format, read_pairs
from analyses.collapse.prompts import grow, merging_sentence
from probe.attention import Visible
from probe.capture import capturing
from probe.errors import UserError
from probe.language import LanguageModel
from probe.rounding import rounded_model
from probe.sites import parse_site


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return long_llama()


def decoded(model: LanguageModel, ids) -> str:
    return str(model.tokenizer.decode(torch.as_tensor(ids)))


def prompt_of(model, growing, n: int, more: int = 0) -> torch.Tensor:
    one = growing.reading(n, more)
    suffix = torch.tensor(one.suffix, dtype=torch.long)
    return torch.cat([growing.trunk[: one.n_trunk], suffix])


# ------------------------------------------------------------------------------------- prompts


def test_every_family_says_what_it_repeats(model):
    sequences = {
        "ones": ("1111", "11111"),
        "copying": ("1111", "11111"),
        "commas": ("111,1", "111,11"),
        "sum": ("1 + 1 + 1 + 1", "1 + 1 + 1 + 1 + 1"),
        "words": (" car car car car", " car car car car car"),
    }
    for name, (four, five) in sequences.items():
        family = find_family(name)
        for phrasing, question in enumerate(family.questions):
            growing = grow(model, family, 5, phrasing=phrasing)
            for n, sequence in ((4, four), (5, five)):
                text = decoded(model, prompt_of(model, growing, n))
                assert text == f"<|endoftext|>{question}{sequence}"
            assert torch.equal(prompt_of(model, growing, 4, 1), prompt_of(model, growing, 5))


def test_random_digits_end_in_one_or_two_ones(model):
    growing = grow(model, find_family("digits"), 9, seed=3)
    short, long = (decoded(model, prompt_of(model, growing, 8, more)) for more in (0, 1))
    assert long == short + "1" and short.endswith("1")
    assert len(short) == len("<|endoftext|>" + FAMILIES[1].questions[0]) + 8
    again = grow(model, find_family("digits"), 9, seed=3)
    assert torch.equal(growing.trunk, again.trunk)
    assert not torch.equal(growing.trunk, grow(model, find_family("digits"), 9, seed=4).trunk)


def test_every_form_puts_the_sequence_where_it_says(model):
    ones = find_family("ones")
    question = ones.questions[0]
    texts = {
        form: decoded(model, prompt_of(model, grow(model, ones, 4, form=form), 3))
        for form in ("raw", "bare", "question last", "chat", "shuffled")
    }
    assert texts["bare"] == question + "111" and texts["raw"] == "<|endoftext|>" + texts["bare"]
    assert texts["question last"].endswith(question + "111") and "answer" in texts["question last"]
    assert texts["chat"] == f"<user>{question}111|<assistant>"
    assert texts["shuffled"] != texts["raw"] and texts["shuffled"].endswith("111")
    assert sorted(texts["shuffled"]) == sorted(texts["raw"])


def merging_model() -> LanguageModel:
    """A model whose tokenizer makes one token of two ones."""
    model = long_llama()
    vocabulary = {"<|endoftext|>": 0} | {
        symbol: i + 1 for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"11": 257}, merges=[("1", "1")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    return model


def test_a_tokenizer_that_merges_digits_is_corrected_or_refused(model):
    merging = merging_model()
    growing = grow(merging, find_family("ones"), 6)
    assert (
        len(set(growing.trunk[growing.ends[0] :].tolist())) == 1
        and growing.ends[6] - 6 == (growing.ends[0])
    )
    assert "merges digits ('111111111111' becomes '11'" in merging_sentence(merging)
    assert merging_sentence(model) == ""
    with pytest.raises(UserError, match="so n ones are not n tokens; choose a model"):
        grow(merging, find_family("ones"), 6, merged="refuse")
    grow(merging, find_family("words"), 6, merged="refuse")
    with pytest.raises(UserError, match="has no chat template; leave the form"):
        grow(merging, find_family("ones"), 6, form="chat")


def test_unknown_families_are_refused():
    with pytest.raises(UserError, match="'twos' is no prompt family; wanted one of ones, digits"):
        find_family("twos")


def test_smollm2_reads_a_token_for_every_one(smollm2):
    growing = grow(smollm2, find_family("ones"), 30)
    text = decoded(smollm2, growing.trunk)
    assert len(smollm2.tokenizer("1" * 30, add_special_tokens=False)["input_ids"]) == 30
    assert text.endswith("1" * 30) and merging_sentence(smollm2) == ""


# -------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("name, form", [("ones", "raw"), ("digits", "raw"), ("commas", "raw"),
                                        ("ones", "chat"), ("digits", "chat")])  # fmt: skip
def test_a_curve_is_what_plain_passes_give(model, name, form):
    family, lengths = find_family(name), [1, 2, 7, 30]
    table: Frame = curve(model, Condition(family=family, form=form, more=(1, 3)), lengths, unit=1)
    growing = grow(model, family, 33, form=form, phrasing=1, seed=1)
    sites = [parse_site("resid_post.0"), parse_site("resid_post.1"), final_site(model)]
    heads = [parse_site("head_out.0"), parse_site("head_out.1")]

    def read(n: int, more: int):
        prompt = prompt_of(model, growing, n, more)
        with torch.no_grad(), capturing(model, [*sites, *heads], early_exit=False) as seen:
            logits = model.run(prompt[None])
        return {site: tensor[0, -1] for site, tensor in seen.items()}, logits[0, -1].argmax()

    for n, more in itertools.product(lengths, (1, 3)):
        (a, top), (b, other) = read(n, 0), read(n, more)
        rows = table[(table["n"] == n) & (table["more"] == more)].set_index("layer")
        for layer, site in enumerate(sites):
            wanted = float((a[site] - b[site]).norm() / a[site].norm())
            assert rows.loc[layer, "distance"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        for layer, site in enumerate(heads):
            furthest = (a[site] - b[site]).abs().view(4, 8).amax(1)
            assert rows.loc[layer, "head_mean"] == pytest.approx(float(furthest.mean()), rel=1e-3)
            assert rows.loc[layer, "head_low"] == pytest.approx(float(furthest.min()), rel=1e-3)
            assert rows.loc[layer, "head_high"] == pytest.approx(float(furthest.max()), rel=1e-3)
        assert bool(rows.loc[2, "same_top"]) == (top == other)


def test_smollm2s_curve_is_what_plain_passes_give(smollm2):
    lengths = [1, 11, 101]
    table: Frame = curve(smollm2, Condition(family=find_family("ones")), lengths)
    final = table[table["layer"] == smollm2.n_layers].set_index("n")["distance"]
    growing = grow(smollm2, find_family("ones"), 102)
    site = final_site(smollm2)
    for n in lengths:
        with torch.no_grad(), capturing(smollm2, [site], early_exit=False) as seen:
            smollm2.run(growing.trunk[None, : growing.ends[n]])
            y = seen[site][0, -1]
            smollm2.run(growing.trunk[None, : growing.ends[n + 1]])
            wanted = float((y - seen[site][0, -1]).norm() / y.norm())
        assert final[n] == pytest.approx(wanted, rel=0.01)
    assert final[1] > final[11] > final[101], "it collapses"


def test_distances_by_hand():
    y, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
    assert relative(y, other).item() == pytest.approx(0.2)
    z = torch.tensor([[0.0, 1.0, 5.0, 5.0]])
    assert by_head(z, torch.zeros(1, 4), 2).tolist() == [[1.0, 5.0]]


def test_lengths_hold_the_papers_and_the_last():
    lengths = lengths_up_to(101)
    assert {1, 2, 6, 11, 51, 101} <= set(lengths) and lengths == sorted(set(lengths))
    assert lengths_up_to(40)[-1] == 40 and 2001 in lengths_up_to(2500)


def test_what_the_context_has_room_for():
    model = long_llama(context=100)
    growing = grow(model, find_family("ones"), 200)
    n = longest_that_fits(model, growing)
    assert growing.ends[n] == 100
    with pytest.raises(UserError, match="reads at most 100"):
        curve(model, Condition(family=find_family("ones")), [n])


# ----------------------------------------------------------------------------------- precision


def test_a_format_beside_exact_arithmetic(model):
    condition, lengths = Condition(family=find_family("ones")), [2, 20, 100]
    exact_model, coarse = (rounded_model(model, f) for f in ("float64", "bfloat16"))
    exact, last = (
        read_pairs(m, condition, lengths, unit=0, merged="correct") for m in (exact_model, coarse)
    )
    table: Frame = in_format(model, last, exact, lengths)
    site = final_site(model)
    y, true = last.values[site], exact.values[site]
    assert table["equal_coordinates"][1] == float((y[2] == y[3]).double().mean())
    floors = [(true[i] - y[i]).norm() / true[i].norm() for i in (4, 5)]
    assert table["floor"][2] == pytest.approx(float(sum(floors)) / 2)
    itself: Frame = in_format(model, exact, exact, lengths)
    assert itself["floor"].tolist() == [0, 0, 0] and not itself["same_hidden"].any()


def test_from_where_on_pairs_are_equal():
    assert equal_from([1, 5, 9], [False, True, True]) == 5
    assert equal_from([9, 1, 5], [False, True, True]) is None
    assert equal_from([1, 5], [True, True]) == 1


# ----------------------------------------------------------------------------------- behaviour


def slow_margin(model, pair, asked: Asked, n: int, visible: Visible) -> float:
    """The margin out of whole prompts, a pass each."""
    before, suffix, (right, other) = copying_frame(model, pair, asked)
    a, b = str(pair[0]), str(pair[1])
    gaps = []
    for with_a in (True, False):
        digits = [b] * n if asked.end != "alternating" else [(a, b)[i % 2] for i in range(n)]
        if asked.end == "first":
            digits[0] = a if with_a else b
        else:
            digits[-1] = a if with_a else b
        if asked.separators:
            digits = [("," if i and i % 3 == 0 else "") + digit for i, digit in enumerate(digits)]
        ids = model.tokenizer("".join(digits), add_special_tokens=False)["input_ids"]
        prompt = torch.tensor([*before, *ids, *suffix])
        mask = visible.mask(0, len(prompt), model.dtype, model.device)
        with torch.no_grad():
            logits = model.model(input_ids=prompt[None], attention_mask=mask).logits[0, -1]
        gaps.append(float(logits[right] - logits[other]))
    return gaps[0] - gaps[1]


def test_margins_are_what_plain_passes_give(model):
    asked = [
        Asked(end="last"),
        Asked(end="last", hint=True, separators=True),
        Asked(end="first", separators=True),
        Asked(end="first", hint=True, order="question first"),
        Asked(end="alternating", order="question first"),
    ]
    lengths, visible = [2, 4, 9], Visible(window=50)
    table: Frame = margins(model, (0, 1), asked, lengths, visible=visible)
    assert len(table) == len(asked) * len(lengths)
    rows: Frame = table.reset_index(drop=True)
    for i, (one, n) in enumerate(itertools.product(asked, lengths)):
        wanted = slow_margin(model, (0, 1), one, n, visible)
        assert rows["margin"][i] == pytest.approx(wanted, abs=1e-4)
        assert (rows["end"][i], rows["n"][i]) == (one.end, n)


def test_the_question_stands_where_it_says(model):
    def text(asked: Asked) -> str:
        before, suffix, answers = copying_frame(model, (3, 5), asked)
        assert [decoded(model, [answer]) for answer in answers] == ["3", "5"]
        return decoded(model, before) + "..." + decoded(model, suffix)

    plain = text(Asked(end="last"))
    assert plain.startswith("<user>Consider the following sequence: ...") and plain.endswith(STEM)
    assert "What is the last digit" in plain and "Hint" not in plain
    hinted = text(Asked(end="first", hint=True))
    assert "first digit" in hinted and "*Hint* It's not necessarily a 5" in hinted
    swapped = text(Asked(end="last", order="question first"))
    assert "...|<assistant>" + STEM in swapped


def test_pairs_are_of_different_digits():
    assert len(set(PAIRS)) == len(PAIRS) and all(a != b for a, b in PAIRS)


def test_what_is_counted():
    assert elements("sum", 3, 0) == (["1", " + 1", " + 1"], 3)
    pieces, true = elements("random ones", 50, 0)
    assert pieces.count("1") == true and pieces[-1] == "1" and 25 < true < 45
    assert elements("words", 2, 0) == ([" car", " car"], 2)
    assert first_number("about 1,234 ones") == 1234 and np.isnan(first_number("many"))


def test_counting_against_a_plain_pass(model):
    table: Frame = counting(model, "ones", [12])
    turn = "Please give the answer on the final line exactly as 'The final answer to your maths"
    before = f"<user>{turn} question is: xxxx'. How many ones are in the following sequence? "
    gaps = []
    for n in (12, 13):
        text = before + "1" * n + "|<assistant>The final answer to your maths question is: 1"
        ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = model.run(ids[None])[0, -1]
        two, three = model.tokenizer("23", add_special_tokens=False)["input_ids"]
        gaps.append(float(logits[two] - logits[three]))
    assert table["margin"][0] == pytest.approx(gaps[0] - gaps[1], abs=1e-4)
    assert table["true"][0] == 12


# ------------------------------------------------------------------------------------ features


def test_telling_by_hand():
    # The second feature changes by 20 %, the third by 5 %, the first is below the mean square.
    at_n = torch.tensor([[0.1, 1.0, 2.0]])
    one_more = torch.tensor([[0.3, 1.25, 2.1]])
    values = Values(source="s", layer=3, at_n=at_n, one_more=one_more)
    row: Frame = telling(values, [7]).iloc[0]
    # The root mean square at n is sqrt((.01 + 1 + 4) / 3) = 1.29: features 2 (2.0) is active, and
    # 1 (1.25) is not.
    assert (row["active"], row["tell"], row["differ_in_bfloat16"]) == (1, 0, 1)
    assert (row["n"], row["layer"], row["source"]) == (7, 3, "s")
    louder = Values(source="s", layer=0, at_n=at_n * 0 + 1, one_more=at_n * 0 + 1.2)
    assert telling(louder, [7]).iloc[0]["tell"] == 3


def test_features_that_follow_n_in_every_phrasing():
    n = np.array([1, 10, 20, 40, 80])
    up, flat = torch.tensor(n, dtype=torch.float32), torch.full((5,), 2.0)
    small = 10 + 0.001 * up
    there_and_back = torch.tensor([0.0, 1.0, 5.0, 1.0, 0.5])
    first = torch.stack([up, -up, flat, small, there_and_back], dim=1)
    second = torch.stack([2 * up, up, flat, small, there_and_back], dim=1)

    def values(x) -> Values:
        return Values(source="s", layer=0, at_n=x, one_more=x)

    rho = counters([values(first), values(second)], n.tolist())
    assert rho[0] == pytest.approx(1) and rho[1] == 0, "another direction in another phrasing"
    assert rho[2] == rho[3] == 0, "no range"
    ranks = pd.Series([1.0, 5.0, 1.0, 0.5]).corr(pd.Series([1.0, 2, 3, 4]), method="spearman")
    assert rho[4] == pytest.approx(ranks)
