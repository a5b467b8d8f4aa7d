"""Files of other projects, written by `peer_files` from their descriptions, through our readers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peer_files import (
    CLASSES,
    Formula,
    dictionary_formula,
    dictionary_tensors,
    draw,
    rows_for,
    save_torch,
    write_dictionary,
    write_openai,
    write_saelens,
    write_sdxl_unbox,
    write_sparsify,
    write_top_afa,
    write_trainer,
)
from safetensors.numpy import load_file, save_file

from probe.errors import Failure, UserError
from saes.activations import (
    BatchTopK,
    Gated,
    JumpRelu,
    Matryoshka,
    Relu,
    TopAfa,
    TopK,
)
from saes.folder import load_sae, save_sae
from saes.interop import sparsify
from saes.interop.reading import read_peer, sniff
from saes.interop.records import Imported
from saes.interop.verifying import probe_rows, says_of, verify
from saes.models import SparseAutoencoder

D, L, K = 7, 29, 4


def assert_same(imported: Imported, formula: Formula, x: np.ndarray, *, rescaled: bool = False):
    """Codes and reconstructions are the formula's; where rows were rescaled, the latter alone."""
    sae = imported.sae
    output = sae(torch.from_numpy(x))
    codes, reconstruction = formula(x)
    scale = np.abs(reconstruction).max()
    np.testing.assert_allclose(output.reconstruction.numpy(), reconstruction, atol=1e-5 * scale)
    if not rescaled:
        found = output.codes.dense(sae.config.d_sae).numpy()
        np.testing.assert_allclose(found, codes, atol=1e-5 * np.abs(codes).max())
        assert (codes != 0).any() and (codes == 0).any(), "a formula that says something"


# ------------------------------------------------------------------------------------------ SAELens


@pytest.mark.parametrize(
    ("architecture", "activation"),
    [("topk", TopK), ("standard", Relu), ("jumprelu", JumpRelu), ("gated", Gated)],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm"},
        {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"},
        {"reshape_activations": "hook_z"},
    ],
    ids=["plain", "reads x", "layer norm", "reads x, layer norm", "hook_z"],
)
@pytest.mark.parametrize("unit", [True, False])
def test_saelens(tmp_path: Path, architecture: str, activation: type, options: dict, unit: bool):
    formula = write_saelens(tmp_path, architecture, options=options, unit=unit)
    imported = read_peer(tmp_path)
    assert imported.format == "saelens"
    assert isinstance(imported.sae.config.activation, activation)
    assert_same(imported, formula, rows_for(0, D))
    said = " ".join(imported.notes)
    assert ("folded into its bias" in said) == (options.get("apply_b_dec_to_input") is False)
    assert ("kept so" in said) == (not unit)
    assert "prepend_bos" in said
    assert ("head_out" in said) == (options.get("reshape_activations") == "hook_z")


@pytest.mark.parametrize("reads_x", [True, False])
def test_saelens_rescaled_by_decoder_norm(tmp_path: Path, reads_x: bool):
    options = {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": not reads_x}
    formula = write_saelens(tmp_path, "topk", options=options, unit=False)
    imported = read_peer(tmp_path)
    assert_same(imported, formula, rows_for(0, D))
    norms = imported.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(L))


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
@pytest.mark.parametrize("reads_x", [True, False])
def test_saelens_input_scale(tmp_path: Path, architecture: str, reads_x: bool):
    options = {
        "normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": not reads_x,
    }  # fmt: skip
    formula = write_saelens(tmp_path, architecture, options=options, scale=0.37)
    with pytest.raises(UserError, match="--input-scale"):
        read_peer(tmp_path)
    assert_same(read_peer(tmp_path, input_scale=0.37), formula, rows_for(0, D))
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.37}')
    assert_same(read_peer(tmp_path), formula, rows_for(0, D))


@pytest.mark.parametrize("widths", [None, [5, 11, L]])
@pytest.mark.parametrize("rescaled", [True, False])
def test_saelens_batchtopk_of_training(tmp_path: Path, widths: list[int] | None, rescaled: bool):
    write_saelens(tmp_path, "topk", unit=not rescaled)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["topk_threshold"] = np.array(0.4, np.float64)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg |= {"architecture": "batchtopk", "k": 3.6, "topk_threshold_lr": 0.01}
    cfg |= {"rescale_acts_by_decoder_norm": rescaled, "decoder_init_norm": 0.1}
    if widths:
        cfg |= {"architecture": "matryoshka_batchtopk", "matryoshka_widths": widths}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        norms = np.linalg.norm(w["W_dec"], axis=1) if rescaled else np.ones(L)
        pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
        codes = np.where(pre > 0.4, pre, 0)
        return codes, (codes / norms) @ w["W_dec"] + w["b_dec"]

    imported = read_peer(tmp_path)
    wanted = BatchTopK(k=4) if widths is None else Matryoshka(k=4, prefixes=(5, 11))
    assert imported.sae.config.activation == wanted
    assert_same(imported, formula, rows_for(0, D))


def test_saelens_jumprelu_that_was_a_matryoshka(tmp_path: Path):
    metadata = {
        "sae_lens_version": "6.1.0", "training_architecture": "matryoshka_batchtopk",
        "training_architecture_details": {"k": 4, "matryoshka_widths": [5, L]},
    }  # fmt: skip
    formula = write_saelens(tmp_path, "jumprelu", options={"metadata": metadata})
    imported = read_peer(tmp_path)
    assert imported.sae.config.activation == Matryoshka(k=4, prefixes=(5,))
    assert_same(imported, formula, rows_for(0, D))


def test_saelens_negative_thresholds_and_old_names(tmp_path: Path):
    write_saelens(tmp_path, "jumprelu")
    file = tmp_path / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["threshold"][:10] = -0.5
    save_file(tensors, file)
    v = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pre = (x - v["b_dec"]) @ v["W_enc"] + v["b_enc"]
        codes = np.maximum(pre, 0) * (pre > v["threshold"])
        return codes, codes @ v["W_dec"] + v["b_dec"]

    assert_same(read_peer(tmp_path), formula, rows_for(0, D))
    v["threshold"] = np.maximum(v["threshold"], 0.01)
    tensors["log_threshold"] = np.log(v["threshold"]).astype(np.float32)
    del tensors["threshold"]
    save_file(tensors, file)
    assert_same(read_peer(tmp_path), formula, rows_for(0, D))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": {"sae_lens_version": "5.11.0"}}, "5.11.0, whose configs"),
        ({"metadata": {}}, "before 6, whose configs"),
        ({"metadata": None}, "before 6"),
        ({"architecture": "transcoder"}, "architecture 'transcoder'"),
        ({"architecture": "matching_pursuit"}, "do not reconstruct their own input"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"reshape_activations": "hook_q"}, "reshape_activations"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"k": 30}, "k"),
        ({"k": 2.5}, "whole number"),
        ({"k": None}, "whole number"),
        ({"d_sae": 28}, "of shape"),
        ({"d_in": "wide"}, "whole number"),
    ],
)
def test_saelens_that_has_no_place(tmp_path: Path, options: dict, words: str):
    write_saelens(tmp_path, "topk")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | options))
    with pytest.raises((UserError, Failure), match=words):
        read_peer(tmp_path)


@pytest.mark.parametrize("file", ["activation_whitening.safetensors"])
def test_saelens_whitening_is_refused(tmp_path: Path, file: str):
    write_saelens(tmp_path, "topk")
    save_file({"mean": np.zeros(D, np.float32)}, tmp_path / file)
    with pytest.raises(UserError, match="whitens its input"):
        read_peer(tmp_path)


# ------------------------------------------------------------------------------------------- others


def test_sparsify(tmp_path: Path):
    formula = write_sparsify(tmp_path / "layers.5.mlp", options={"multi_topk": True})
    imported = read_peer(tmp_path / "layers.5.mlp")
    assert imported.format == "sparsify"
    assert imported.sae.config.activation == TopK(k=K, multi=True)
    assert imported.metadata["site"] == "mlp_out.5"
    assert imported.metadata["hook_name"] == "blocks.5.hook_mlp_out"
    assert_same(imported, formula, rows_for(0, D))


def test_sparsify_by_expansion_factor_and_in_half_precision(tmp_path: Path):
    folder = tmp_path / "h.3"
    formula = write_sparsify(folder, d=8, L=32, options={"num_latents": 0, "expansion_factor": 4})
    assert_same(read_peer(folder), formula, rows_for(0, 8))
    halves = {k: v.astype(np.float16) for k, v in load_file(folder / "sae.safetensors").items()}
    save_file(halves, folder / "sae.safetensors")
    imported = read_peer(folder)
    assert imported.metadata["site"] == "resid_post.3"
    np.testing.assert_array_equal(imported.sae.W_dec.numpy(), halves["W_dec"].astype(np.float32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "W_skip"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"signed": True}, "absolute value"),
        ({"gram_lookup": True}, "n-grams"),
        ({"num_latents": 30}, "do not belong together"),
        ({"d_in": 8}, "do not belong together"),
        ({"k": 0}, "from 1 on"),
        ({"new_option": 1}, "new_option"),
    ],
)
def test_sparsify_that_has_no_place(tmp_path: Path, options: dict, words: str):
    write_sparsify(tmp_path, options=options)
    with pytest.raises((UserError, Failure), match=words):
        read_peer(tmp_path)


def test_sparsify_with_a_skip_tensor_is_refused(tmp_path: Path):
    write_sparsify(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    save_file(tensors | {"W_skip": np.eye(D, dtype=np.float32)}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="W_skip"):
        read_peer(tmp_path)


ACTIVATIONS = {
    "AutoEncoder": Relu, "AutoEncoderNew": Relu, "AutoEncoderTopK": TopK,
    "BatchTopKSAE": BatchTopK, "GatedAutoEncoder": Gated, "JumpReluAutoEncoder": JumpRelu,
    "MatryoshkaBatchTopKSAE": Matryoshka,
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning(tmp_path: Path, name: str):
    formula = write_dictionary(tmp_path, name)
    imported = read_peer(tmp_path)
    assert imported.format == "dictionary_learning"
    assert isinstance(imported.sae.config.activation, ACTIVATIONS[name])
    assert imported.metadata["model_name"] == "EleutherAI/p"
    assert imported.metadata["site"] == "resid_post.5"
    assert_same(imported, formula, rows_for(0, D))
    if name == "MatryoshkaBatchTopKSAE":
        assert imported.sae.config.activation == Matryoshka(k=K, prefixes=(7, 14))


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning_backup(tmp_path: Path, name: str):
    """A backup reads inputs over norm_factor: its formula on x / f, times f, is the SAE of x."""
    w, factor = draw(0, D, L), 3.25
    backup = {
        "step": 500, "ae": dictionary_tensors(name, w, K), "config": {"dict_class": name},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "norm_factor": factor,
    }  # fmt: skip
    save_torch(tmp_path / "ae.pt", backup)
    imported = read_peer(tmp_path)
    inner = dictionary_formula(name, w, K)

    def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes, reconstruction = inner(x / factor)
        return codes * factor, reconstruction * factor

    assert_same(imported, formula, rows_for(0, D))
    assert any("backup from step 500" in note and "3.25" in note for note in imported.notes)


def test_dictionary_learning_without_a_config(tmp_path: Path):
    w = draw(0, D, L)
    for name in ("GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoder"):
        file = tmp_path / name / "checkpoints" / "ae_100.pt"
        save_torch(file, dictionary_tensors(name, w, K))
        assert_same(read_peer(file), dictionary_formula(name, w, K), rows_for(0, D))
    file = tmp_path / "either" / "ae.pt"
    save_torch(file, dictionary_tensors("BatchTopKSAE", w, K))
    with pytest.raises(UserError, match="AutoEncoderTopK or BatchTopKSAE"):
        read_peer(file)
    write_trainer(tmp_path / "either", "BatchTopKSAE")
    assert_same(read_peer(file), dictionary_formula("BatchTopKSAE", w, K), rows_for(0, D))
    write_trainer(tmp_path / "either", "CrossCoder")
    with pytest.raises(UserError, match="CrossCoder"):
        read_peer(file)


def test_dictionary_learning_threshold_that_was_never_set(tmp_path: Path):
    w = draw(0, D, L)
    tensors = dictionary_tensors("BatchTopKSAE", w, K) | {"threshold": torch.tensor(-1.0)}
    save_torch(tmp_path / "ae.pt", tensors)
    write_trainer(tmp_path, "BatchTopKSAE")
    imported = read_peer(tmp_path)
    assert_same(imported, dictionary_formula("AutoEncoder", w, K), rows_for(0, D))
    assert any("never set" in note for note in imported.notes)


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai(tmp_path: Path, activation: str):
    file = tmp_path / "resid_delta_mlp_v5_32k" / "autoencoders" / "8.pt"
    formula = write_openai(file, activation)
    imported = read_peer(file)
    assert imported.format == "openai"
    assert imported.metadata["site"] == "mlp_out.8"
    assert imported.sae.config.normalize == ("layer_norm" if activation == "TopK" else "none")
    assert_same(imported, formula, rows_for(0, D))


def test_openai_of_another_activation_is_refused(tmp_path: Path):
    write_openai(tmp_path / "8.pt", "Identity")
    with pytest.raises(UserError, match="'Identity'"):
        read_peer(tmp_path / "8.pt")


def test_sdxl_unbox(tmp_path: Path):
    name = "unet.down_blocks.2.attentions.1_k10_hidden5120_auxk256_bs4096_lr0.0001"
    formula = write_sdxl_unbox(tmp_path / name / "final")
    imported = read_peer(tmp_path / name / "final")
    assert imported.format == "sdxl-unbox"
    assert imported.metadata["site"] == "down.2.1"
    assert any("output minus input" in note for note in imported.notes)
    assert_same(imported, formula, rows_for(0, D))
    assert_same(read_peer(tmp_path / name / "final" / "state_dict.pth"), formula, rows_for(0, D))


@pytest.mark.parametrize("kind", ["topafa", "topk"])
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_top_afa(tmp_path: Path, kind: str, standardise: bool, unit: bool):
    formula = write_top_afa(tmp_path, kind, standardise=standardise, unit=unit)
    imported = read_peer(tmp_path)
    assert imported.format == "top-afa"
    wanted = TopAfa(afa=0.03, paper_code=True) if kind == "topafa" else TopK(k=K)
    assert imported.sae.config.activation == wanted
    assert imported.metadata["site"] == "resid_pre.8"
    assert any("never adds" in note for note in imported.notes)
    assert_same(imported, formula, rows_for(0, D))


def test_top_afa_that_depends_on_its_batch_is_refused(tmp_path: Path):
    write_top_afa(tmp_path, "batchtopk")
    with pytest.raises(UserError, match="no threshold"):
        read_peer(tmp_path)


# --------------------------------------------------------------------------------- sizes and norms

WRITERS: dict[str, Callable[..., Formula]] = {
    "sparsify": write_sparsify,
    "sdxl-unbox": write_sdxl_unbox,
    "saelens": lambda folder, **sizes: write_saelens(folder, "jumprelu", **sizes),
    "dictionary_learning": lambda folder, **sizes: write_dictionary(
        folder, "MatryoshkaBatchTopKSAE", **sizes
    ),
    "top-afa": lambda folder, **sizes: write_top_afa(folder, "topafa", **sizes),
}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    format=st.sampled_from(sorted(WRITERS)),
    d=st.integers(2, 20),
    L=st.integers(4, 40),
    k=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_odd_sizes(
    tmp_path_factory: pytest.TempPathFactory, format: str, d: int, L: int, k: int, seed: int
):
    folder = tmp_path_factory.mktemp("odd")
    formula = WRITERS[format](folder, d=d, L=L, k=k, seed=seed)
    imported = read_peer(folder)
    assert imported.format == format
    x = rows_for(seed, d, n=20)
    output = imported.sae(torch.from_numpy(x))
    codes, reconstruction = formula(x)
    close = np.isclose(
        output.reconstruction.numpy(), reconstruction, atol=1e-4 * np.abs(reconstruction).max()
    ).all(1)
    same = np.isclose(output.codes.dense(L).numpy(), codes, atol=1e-4 * max(codes.max(), 1)).all(1)
    # A row may sit on a threshold or a tie in float32 that it does not sit on in float64.
    assert (close & same).mean() >= 0.9


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_unit_norm_scales_codes_by_the_rows_lengths(tmp_path: Path, architecture: str):
    formula = write_saelens(tmp_path, architecture, unit=False)
    norms = np.linalg.norm(load_file(tmp_path / "sae_weights.safetensors")["W_dec"], axis=1)
    imported = read_peer(tmp_path, unit_norm=True)
    torch.testing.assert_close(imported.sae.W_dec.norm(dim=1), torch.ones(L))
    assert_same(imported, lambda x: (formula(x)[0] * norms, formula(x)[1]), rows_for(0, D))


def test_unit_norm_of_top_afa_chooses_the_same(tmp_path: Path):
    formula = write_top_afa(tmp_path, "topafa", unit=False)
    norms = torch.load(tmp_path / "sae.pt", weights_only=True)["W_dec"].norm(dim=1).numpy()
    imported = read_peer(tmp_path, unit_norm=True)
    assert_same(imported, lambda x: (formula(x)[0] * norms, formula(x)[1]), rows_for(0, D))


def test_unit_norm_of_topk_says_how_often_it_chooses_others(tmp_path: Path):
    formula, x = write_saelens(tmp_path, "topk", unit=False), probe_rows(read_peer(tmp_path).sae)
    imported = read_peer(tmp_path, unit_norm=True)
    recon = formula(x.numpy())[1]
    found = imported.sae(x).reconstruction.numpy()
    others = (np.abs(found - recon).max(1) > 1e-4 * np.abs(recon).max(1)).sum()
    assert 0 < others < len(x)
    assert any(f"on {others} of {len(x)} made rows" in note for note in imported.notes)


def test_zero_decoder_rows_are_said_and_kept(tmp_path: Path):
    write_saelens(tmp_path, "standard")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["W_dec"][3:5] = 0
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    imported = read_peer(tmp_path, unit_norm=True)
    assert any("2 decoder rows are zero" in note for note in imported.notes)
    assert torch.isfinite(imported.sae(torch.from_numpy(rows_for(0, D))).reconstruction).all()


# ------------------------------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (lambda folder: write_saelens(folder, "topk"), "sae_weights.safetensors"),
        (write_sparsify, "sae.safetensors"),
        (write_sdxl_unbox, "state_dict.pth"),
        (lambda folder: write_top_afa(folder, "topafa"), "sae.pt"),
        (lambda folder: write_dictionary(folder, "GatedAutoEncoder"), "ae.pt"),
    ],
)
def test_truncated_files_are_one_sentence(tmp_path: Path, write: Callable, file: str):
    write(tmp_path)
    data = (tmp_path / file).read_bytes()
    for length in (0, 10, 300, len(data) // 2, len(data) - 3):
        (tmp_path / file).write_bytes(data[:length])
        with pytest.raises(Failure, match=r"damaged|missing|holds") as caught:
            read_peer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_numbers_that_are_none(tmp_path: Path, name: str, value: float):
    write_saelens(tmp_path, "topk")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors[name].flat[2] = value
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(Failure, match=f"{name} in .* NaN or infinite"):
        read_peer(tmp_path)


def test_wrong_shapes_missing_tensors_and_integers(tmp_path: Path):
    write_sparsify(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    for change, words in (
        ({"W_dec": tensors["W_dec"].T.copy()}, "W_dec of shape"),
        ({"b_dec": tensors["b_dec"][:3]}, "b_dec of shape"),
        ({"encoder.weight": tensors["encoder.weight"][0]}, "matrix encoder.weight"),
        ({"b_dec": tensors["b_dec"].astype(np.int8)}, "int8"),
    ):
        save_file(tensors | change, tmp_path / "sae.safetensors")
        with pytest.raises(Failure, match=words):
            read_peer(tmp_path)
    del tensors["encoder.bias"]
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(Failure, match=r"encoder\.bias"):
        read_peer(tmp_path)


class Code:
    """Something that a pickle would have to run."""


def test_a_pickle_with_code_is_not_opened(tmp_path: Path):
    save_torch(tmp_path / "ae.pt", {"encoder.weight": torch.zeros(3, 2), "extra": Code()})
    with pytest.raises(Failure, match=r"Code.*is not opened"):
        read_peer(tmp_path)
    save_torch(tmp_path / "ae.pt", torch.zeros(3))
    with pytest.raises(Failure, match="Tensor where a dictionary"):
        read_peer(tmp_path)


def test_descriptions_that_are_none(tmp_path: Path):
    write_sparsify(tmp_path)
    for text in ("", "{", "[]", "null"):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(Failure):
            read_peer(tmp_path)


def test_what_is_no_sae(tmp_path: Path):
    with pytest.raises(UserError, match="there is nothing at"):
        sniff(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no SAE in a format that is read"):
        sniff(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"")
    with pytest.raises(UserError, match="Gemma Scope"):
        sniff(tmp_path)
    write_sparsify(tmp_path / "run" / "layers.1")
    write_sparsify(tmp_path / "run" / "layers.2")
    with pytest.raises(UserError, match=r"several SAEs.*layers\.1.*layers\.2"):
        sniff(tmp_path / "run")
    with pytest.raises(UserError, match="no format that is read"):
        read_peer(tmp_path / "run" / "layers.1", "gguf")
    with pytest.raises(UserError, match="input-scale is for SAELens"):
        read_peer(tmp_path / "run" / "layers.1", input_scale=2.0)


def test_a_transposed_dictionary_is_found_out(tmp_path: Path):
    """Where d = L it has the right shapes, and says something else."""
    write_sparsify(tmp_path, d=12, L=12)
    found = sparsify.read(tmp_path)
    tensors = found.sae.tensors()
    wrong = SparseAutoencoder.from_tensors(
        found.sae.config, tensors | {"W_dec": tensors["W_dec"].T}
    )
    x = probe_rows(found.sae)
    verify(says_of(found.sae, x), found.says(x), "the SAE")
    with pytest.raises(Failure, match="not converted"):
        verify(says_of(wrong, x), found.says(x), "the SAE")


def test_our_own_folder(tmp_path: Path):
    formula = write_sparsify(tmp_path / "layers.1")
    imported = read_peer(tmp_path / "layers.1")
    (tmp_path / "ours").mkdir()
    save_sae(
        imported.sae,
        tmp_path / "ours",
        metadata=imported.metadata,
        golden_x=probe_rows(imported.sae),
    )
    again = read_peer(tmp_path / "ours")
    assert again.format == "lorgnette"
    assert again.metadata["site"] == "resid_post.1"
    assert_same(again, formula, rows_for(0, D))
    load_sae(tmp_path / "ours")
