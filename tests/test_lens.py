"""The logit lens."""

import pytest
import torch

from probe.capture import capturing
from probe.errors import Failure, UserError
from probe.lens import logit_lens
from probe.sites import parse_site
from probe.tokens import read_text
from probe.toy import tiny_llama

TEXT = "The gulls came home."


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_last_layer_is_the_model(name, request):
    model = request.getfixturevalue(name)
    lens = logit_lens(model, TEXT, top=3)
    prompt = read_text(model, TEXT)
    with torch.no_grad():
        logits = model.run(prompt.tokens)[0]
    shares = logits.softmax(-1)
    assert torch.equal(lens.target, logits.argmax(-1))
    torch.testing.assert_close(lens.probability[-1], shares.max(-1).values)
    assert (lens.rank[-1] == 1).all()
    best = shares.topk(3)
    assert torch.equal(lens.top[-1], best.indices)
    torch.testing.assert_close(lens.top_probability[-1], best.values)


def test_earlier_layers_by_hand(llama):
    lens = logit_lens(llama, TEXT)
    prompt = read_text(llama, TEXT)
    with torch.no_grad(), capturing(llama, [parse_site("resid_post.0")]) as seen:
        llama.run(prompt.tokens)
        stream = seen[parse_site("resid_post.0")]
        logits = llama.model.lm_head(llama.model.model.norm(stream))[0]
    shares = logits.softmax(-1)
    for position, target in list(enumerate(lens.target.tolist()))[1:]:  # the first row is all zero
        assert float(lens.probability[0, position]) == pytest.approx(
            float(shares[position, target]), rel=1e-4
        )
        order = logits[position].argsort(descending=True).tolist()
        assert int(lens.rank[0, position]) == order.index(target) + 1
        assert lens.top[0, position].tolist() == order[:5]


def test_one_token_is_followed_through_all_layers(llama):
    lens = logit_lens(llama, TEXT, target=70)
    assert (lens.target == 70).all() and lens.rank.min() >= 1
    with pytest.raises(UserError, match="no token 300"):
        logit_lens(llama, TEXT, target=300)


def test_table_has_a_row_a_place(llama):
    lens = logit_lens(llama, "ab")
    table = lens.table()
    assert len(table) == 2 * 3 and table["layer"].tolist() == [0, 0, 0, 1, 1, 1]
    assert table["token"].tolist()[:3] == list(lens.prompt.texts)
    assert table["top"].iloc[4] == lens.top_texts(1, 1)[0]
    assert table["probability"].iloc[4] == pytest.approx(float(lens.probability[1, 1]))


def test_bfloat16_gives_the_models_own_logits():
    model = tiny_llama()
    model.model.bfloat16()
    lens = logit_lens(model, TEXT)
    assert (lens.rank[-1] == 1).all()


def test_a_model_that_does_something_in_between_is_not_read():
    model = tiny_llama()
    model.model.register_forward_hook(lambda module, args, out: out | {"logits": 3 * out.logits})
    with pytest.raises(Failure, match="would mislead"):
        logit_lens(model, TEXT)


def test_a_model_of_unknown_parts_is_told_in_a_sentence():
    model = tiny_llama()
    model.names, model.n_layers = None, 0
    with pytest.raises(UserError, match="not known by name"):
        logit_lens(model, TEXT)
