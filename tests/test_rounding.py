"""Number formats, emulated: rounding by hand, and a model that rounds everything it computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

from probe.capture import capturing
from probe.errors import UserError
from probe.language import LanguageModel
from probe.rounding import FORMATS, rounded, rounded_model
from probe.sites import parse_site
from probe.toy import byte_tokenizer, tiny_gpt2, tiny_llama

TOKENS = torch.tensor([[0, 12, 80, 81, 80, 9]])


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_casts_are_torchs_own(numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    assert torch.equal(rounded(x, "bfloat16"), x.to(torch.bfloat16).double())
    assert torch.equal(rounded(x, "float16"), x.to(torch.float16).double())
    assert torch.equal(rounded(x, "float64"), x)


def test_scaled_formats_by_hand():
    x = torch.tensor([[1.27, 0.504, -0.333], [0.0, 0.0, 0.0]], dtype=torch.float64)
    # The largest is 127 steps of 0.01.
    wanted = torch.tensor([[1.27, 0.50, -0.33], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(rounded(x, "int8"), wanted)
    # Of e4m3 448 is the largest; 2.05 is between 2 and 2.25.
    x = torch.tensor([448.0, 2.05, 2.2], dtype=torch.float64)
    wanted = torch.tensor([448.0, 2.0, 2.25], dtype=torch.float64)
    torch.testing.assert_close(rounded(x, "float8"), wanted)
    torch.testing.assert_close(rounded(x / 448, "float8"), wanted / 448)


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_twice_is_rounding_once(format):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = rounded(x, format)
    torch.testing.assert_close(rounded(once, format), once)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_everything_that_passes_by_is_a_number_of_the_format(make):
    model = rounded_model(make(), "bfloat16")
    kinds = ("resid_post", "attn_out", "mlp_out")
    sites = [parse_site(f"{kind}.{layer}") for kind in kinds for layer in (0, 1)]
    with capturing(model, sites, early_exit=False) as seen, torch.no_grad():
        logits = model.run(TOKENS)
    assert logits is not None and logits.dtype == torch.float64
    for site in sites:
        assert torch.equal(seen[site], seen[site].bfloat16().double()), site
    assert torch.equal(logits, logits.bfloat16().double())


def test_float64_is_the_model_itself_and_the_model_is_left_alone():
    model = tiny_llama()
    before = model.run(TOKENS)
    exact = rounded_model(model, "float64").run(TOKENS)
    rounded_model(model, "float16")
    after = model.run(TOKENS)
    assert before is not None and exact is not None and after is not None
    torch.testing.assert_close(exact.float(), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(before, after)


def test_coarser_formats_err_more_and_bfloat16_errs_as_the_real_one_does():
    model = tiny_llama()
    exact = rounded_model(model, "float64").run(TOKENS)

    assert exact is not None
    reference = exact.detach()

    def error(logits) -> float:
        return float((logits.detach().double() - reference).norm() / reference.norm())

    errors = {format: error(rounded_model(model, format).run(TOKENS)) for format in FORMATS}
    assert errors["float64"] == 0 < errors["float32"] < 1e-6
    assert errors["float32"] < errors["float16"] < errors["bfloat16"] < errors["float8"]
    native = error(tiny_llama().model.bfloat16()(input_ids=TOKENS).logits)
    assert native / 3 < errors["bfloat16"] < 3 * native


def test_equal_rows_stay_equal_wherever_they_stand():
    model = rounded_model(tiny_llama(), "bfloat16")
    rows = TOKENS.expand(5, -1).clone()
    rows[1:4] = torch.randint(1, 250, (3, 6), generator=torch.Generator().manual_seed(0))
    logits = model.run(rows)
    assert logits is not None
    assert torch.equal(logits[0], logits[4])


def test_a_model_whose_layers_are_not_known_is_refused():
    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = LanguageModel("tiny-mamba", MambaForCausalLM(config), byte_tokenizer())
    with pytest.raises(UserError, match="its rounding cannot be emulated; choose another model"):
        rounded_model(model, "bfloat16")
