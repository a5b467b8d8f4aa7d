"""Folders that we write, read by hand from the formats' descriptions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peer_files import (
    draw,
    keep_largest,
    nearest_prefix,
    rows_for,
    saelens_formula,
    standardised,
)
from safetensors.numpy import load_file

from probe.errors import UserError
from saes.activations import (
    Activation,
    BatchTopK,
    Gated,
    JumpRelu,
    KSparse,
    Matryoshka,
    Relu,
    TopAfa,
    TopK,
)
from saes.interop.freezing import freeze
from saes.interop.reading import read_peer
from saes.interop.writing import write_peer
from saes.models import Normalize, SaeConfig, SparseAutoencoder
from saes.scales import FeatureScales, feature_scales

D, L, K = 7, 29, 4
METADATA = {"model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post", "site": "resid_post.1"}


def make(
    activation: Activation, *, normalize: Normalize = "none", seed: int = 0, unit: bool = True
) -> SparseAutoencoder:
    """An SAE of drawn weights."""
    tied = isinstance(activation, KSparse)
    config = SaeConfig(d_in=D, d_sae=L, activation=activation, normalize=normalize, tied=tied)
    wanted = set(SparseAutoencoder(config).tensors())
    drawn = {name: torch.from_numpy(w) for name, w in draw(seed, D, L, unit=unit).items()}
    tensors = {name: tensor for name, tensor in drawn.items() if name in wanted}
    return SparseAutoencoder.from_tensors(config, tensors).requires_grad_(False)


def doubled_file(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float64) for name, tensor in load_file(path).items()}


def assert_says(sae: SparseAutoencoder, codes: np.ndarray, reconstruction: np.ndarray) -> None:
    """What was written, computed by hand, is what the SAE says."""
    output = sae(torch.from_numpy(rows_for(0, D)))
    found = output.codes.dense(L).numpy()
    np.testing.assert_allclose(found, codes, atol=1e-5 * np.abs(codes).max())
    scale = np.abs(reconstruction).max()
    np.testing.assert_allclose(output.reconstruction.numpy(), reconstruction, atol=1e-5 * scale)
    assert (codes != 0).any()


KNOWN_TO_SAELENS = [
    (TopK(k=K), "topk", "topk"),
    (TopK(k=K, multi=True), "topk", "topk"),
    (BatchTopK(k=K), "jumprelu", "batchtopk"),
    (Matryoshka(k=K, prefixes=(5, 11)), "jumprelu", "matryoshka_batchtopk"),
    (JumpRelu(), "jumprelu", "jumprelu"),
    (Gated(), "gated", "gated"),
    (Relu(), "standard", "standard"),
]


@pytest.mark.parametrize(("activation", "architecture", "trained"), KNOWN_TO_SAELENS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("unit", [True, False])
def test_saelens(
    tmp_path: Path,
    activation: Activation,
    architecture: str,
    trained: str,
    normalize: Normalize,
    unit: bool,
) -> None:
    sae = make(activation, normalize=normalize, unit=unit)
    folder = tmp_path / "out"
    written = write_peer(sae, folder, "saelens", metadata=METADATA | {"activation": {"name": "x"}})
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == architecture
    assert cfg["metadata"]["training_architecture"] == trained
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert "activation" not in cfg["metadata"]
    assert cfg["normalize_activations"] == normalize
    w = doubled_file(folder / "sae_weights.safetensors")
    assert_says(sae, *saelens_formula(w, cfg, cfg.get("k", 0), 1.0, rows_for(0, D)))
    assert ("jumprelu" in " ".join(written.notes)) == (
        architecture != trained and trained != "topk"
    )
    if isinstance(activation, Matryoshka):
        details = cfg["metadata"]["training_architecture_details"]
        assert details == {"k": K, "matryoshka_widths": [5, 11, L]}


def test_the_way_there_and_back_keeps_activation_and_bits(tmp_path: Path) -> None:
    for i, (activation, _, _) in enumerate(KNOWN_TO_SAELENS):
        sae = make(activation)
        write_peer(sae, tmp_path / str(i), "saelens", metadata=METADATA)
        again = read_peer(tmp_path / str(i)).sae
        if not isinstance(activation, TopK):
            assert again.config == sae.config
        for name, tensor in sae.tensors().items():
            # A JumpReLU's threshold is held as its logarithm.
            rtol = 1e-6 if name == "threshold" else 0.0
            torch.testing.assert_close(again.tensors()[name], tensor, rtol=rtol, atol=0.0)


def test_an_sae_of_heads_is_written_as_hook_z(tmp_path: Path) -> None:
    for hook_name, wanted in (("blocks.1.attn.hook_z", "hook_z"), ("blocks.1.hook_z2", "none")):
        folder = tmp_path / hook_name
        write_peer(make(TopK(k=K)), folder, "saelens", metadata={"hook_name": hook_name})
        assert json.loads((folder / "cfg.json").read_text())["reshape_activations"] == wanted
    assert read_peer(tmp_path / "blocks.1.attn.hook_z").metadata["site"] == "head_out.1"


def test_sparsify(tmp_path: Path) -> None:
    sae = make(TopK(k=K))
    write_peer(sae, tmp_path / "layers.1", "sparsify", metadata=METADATA)
    cfg = json.loads((tmp_path / "layers.1" / "cfg.json").read_text())
    assert cfg["d_in"] == D and cfg["num_latents"] == L and cfg["k"] == K
    assert cfg["activation"] == "topk" and not cfg["transcode"] and not cfg["skip_connection"]
    w = doubled_file(tmp_path / "layers.1" / "sae.safetensors")
    assert {name: t.shape for name, t in w.items()} == {
        "encoder.weight": (L, D), "encoder.bias": (L,), "W_dec": (L, D), "b_dec": (D,),
    }  # fmt: skip
    pre = np.maximum((rows_for(0, D) - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    codes = keep_largest(pre, K)
    assert_says(sae, codes, codes @ w["W_dec"] + w["b_dec"])
    assert read_peer(tmp_path / "layers.1").metadata["model_name"] == "gpt2"


@pytest.mark.parametrize("scaled", [True, False])
def test_sdxl_unbox(tmp_path: Path, scaled: bool) -> None:
    sae, x = make(TopK(k=K)), torch.from_numpy(rows_for(0, D))
    scales = feature_scales(sae, x) if scaled else None
    written = write_peer(sae, tmp_path / "s", "sdxl-unbox", metadata=METADATA, scales=scales)
    cfg = json.loads((tmp_path / "s" / "config.json").read_text())
    assert cfg["n_dirs_local"] == L and cfg["d_model"] == D and cfg["k"] == K
    assert {"auxk", "dead_steps_threshold"} <= set(cfg)
    state = torch.load(tmp_path / "s" / "state_dict.pth", weights_only=True)["state_dict"]
    assert state["stats_last_nonzero"].dtype == torch.long
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    assert w["encoder.weight"].shape == (L, D) and w["decoder.weight"].shape == (D, L)
    codes = keep_largest((x.numpy() - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"], K)
    assert_says(sae, codes, codes @ w["decoder.weight"].T + w["pre_bias"])
    if scaled:
        mean = torch.load(tmp_path / "s" / "mean.pt", weights_only=True).numpy()
        sd = torch.load(tmp_path / "s" / "std.pt", weights_only=True).numpy()
        for latent in range(L):
            fired = codes[codes[:, latent] > 0, latent]
            np.testing.assert_allclose(mean[latent], fired.mean() if len(fired) else 0, rtol=1e-5)
            np.testing.assert_allclose(sd[latent], fired.std() if len(fired) else 0, atol=1e-5)
    else:
        assert any("mean.pt" in note for note in written.notes)


# ------------------------------------------------------------------------------------ a fixed k


def error_by_hand(
    codes: np.ndarray, frozen: np.ndarray, w: dict[str, np.ndarray], x: np.ndarray
) -> dict[str, float]:
    """The numbers of `FreezingError`, from dense codes."""
    recon, recon_frozen = (c @ w["W_dec"] + w["b_dec"] for c in (codes, frozen))
    variance = ((x - x.mean(0)) ** 2).sum()
    on, on_frozen = codes != 0, frozen != 0
    return {
        "fvu": ((x - recon) ** 2).sum() / variance,
        "fvu_frozen": ((x - recon_frozen) ** 2).sum() / variance,
        "difference": ((recon - recon_frozen) ** 2).sum() / variance,
        "l0": on.sum(1).mean(),
        "l0_sd": on.sum(1).std(),
        "kept": (on & on_frozen).sum() / on.sum(),
        "added": (on_frozen & ~on).sum() / on_frozen.sum(),
    }


@pytest.mark.parametrize("format", ["saelens", "sparsify", "sdxl-unbox"])
@pytest.mark.parametrize("unit", [True, False])
def test_top_afa_becomes_a_fixed_k_with_its_error(tmp_path: Path, format: str, unit: bool) -> None:
    sae = make(TopAfa(), unit=unit)
    x = rows_for(5, D, n=400)
    written = write_peer(sae, tmp_path / "f", format, metadata=METADATA, rows=torch.from_numpy(x))
    w = {name: tensor.double().numpy() for name, tensor in sae.tensors().items()}
    norms = np.linalg.norm(w["W_dec"], axis=1)

    def top_afa(rows: np.ndarray) -> np.ndarray:
        acts = np.maximum((rows - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
        return nearest_prefix(acts, norms, rows - w["b_dec"])

    k = round((top_afa(x[:200]) != 0).sum(1).mean())
    judged = x[200:].astype(np.float64)
    scaled = ((judged - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    frozen = keep_largest(scaled, k) / norms
    wanted = error_by_hand(top_afa(judged), frozen, w, judged)
    error = freeze(sae, torch.from_numpy(x)).error
    assert (error.k, error.chosen_on, error.measured_on) == (k, 200, 200)
    for name, value in wanted.items():
        assert getattr(error, name) == pytest.approx(value, rel=1e-4), name
    assert written.sae.config.activation == TopK(k=k)
    said = " ".join(written.notes)
    assert f"k = {k}" in said and "FVU" in said
    assert ("old norm" in said) == (not unit)
    again = read_peer(tmp_path / "f")
    assert again.sae.config.activation == TopK(k=k)
    assert again.metadata["frozen"]["fvu_frozen"] == pytest.approx(wanted["fvu_frozen"], rel=1e-4)
    codes = again.sae(torch.from_numpy(x[200:])).codes.dense(L).numpy()
    np.testing.assert_allclose(codes, frozen * norms, atol=1e-4 * frozen.max())


@pytest.mark.parametrize(
    "activation", [BatchTopK(k=K), Matryoshka(k=K, prefixes=(5,)), JumpRelu(), Relu()]
)
def test_sparsify_holds_the_nearest_topk_of_others(tmp_path: Path, activation: Activation) -> None:
    sae, x = make(activation), torch.from_numpy(rows_for(5, D, n=200))
    written = write_peer(sae, tmp_path / "f", "sparsify", metadata=METADATA, rows=x)
    l0 = (sae.encode(x[:100]).values != 0).sum(1).double().mean()
    assert written.sae.config.activation == TopK(k=round(float(l0)))
    assert type(activation).__name__ in " ".join(written.notes)


def test_tied_k_sparse_is_untied_for_saelens(tmp_path: Path) -> None:
    """Its encoder reads x itself; SAELens's reads x - b_dec; what is positive stays the same."""
    sae, x = make(KSparse(k=3, alpha=2.0)), rows_for(5, D, n=200)
    write_peer(sae, tmp_path / "f", "saelens", metadata=METADATA, rows=torch.from_numpy(x))
    cfg = json.loads((tmp_path / "f" / "cfg.json").read_text())
    assert cfg["k"] == 6 and cfg["architecture"] == "topk"
    w = doubled_file(tmp_path / "f" / "sae_weights.safetensors")
    codes, _ = saelens_formula(w, cfg, 6, 1.0, x)
    ours = sae.encode(torch.from_numpy(x)).dense(L).numpy()
    np.testing.assert_allclose(codes, np.maximum(ours, 0), atol=1e-4 * codes.max())
    assert cfg["metadata"]["frozen_from"] == "KSparse"
    assert any("negative" in note for note in cfg["metadata"]["conversion_notes"])


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    rows = torch.from_numpy(rows_for(0, D, n=64))
    with pytest.raises(UserError, match="name a store with --store"):
        write_peer(make(TopAfa()), tmp_path / "f", "saelens", metadata={})
    with pytest.raises(UserError, match="at least 16 rows"):
        write_peer(make(TopAfa()), tmp_path / "f", "saelens", metadata={}, rows=rows[:8])
    with pytest.raises(UserError, match="gate"):
        write_peer(make(Gated()), tmp_path / "f", "sparsify", metadata={}, rows=rows)
    with pytest.raises(UserError, match="normalises each input"):
        write_peer(make(TopK(k=K), normalize="layer_norm"), tmp_path / "f", "sparsify", metadata={})
    with pytest.raises(UserError, match="no format that is written"):
        write_peer(make(TopK(k=K)), tmp_path / "f", "openai", metadata={})
    assert not any(tmp_path.iterdir()), "nothing is left of what was refused"
    write_peer(make(TopK(k=K)), tmp_path / "f", "sparsify", metadata={})
    with pytest.raises(UserError, match="there already"):
        write_peer(make(TopK(k=K)), tmp_path / "f", "saelens", metadata={})


def test_layer_norm_top_afa_goes_to_saelens(tmp_path: Path) -> None:
    sae, x = make(TopAfa(), normalize="layer_norm"), rows_for(5, D, n=200)
    write_peer(sae, tmp_path / "f", "saelens", metadata=METADATA, rows=torch.from_numpy(x))
    cfg = json.loads((tmp_path / "f" / "cfg.json").read_text())
    w = doubled_file(tmp_path / "f" / "sae_weights.safetensors")
    y, mean, deviation = standardised(x.astype(np.float64))
    codes = keep_largest((y - w["b_dec"]) @ w["W_enc"] + w["b_enc"], cfg["k"])
    recon = (codes @ w["W_dec"] + w["b_dec"]) * deviation + mean
    found = read_peer(tmp_path / "f").sae(torch.from_numpy(x)).reconstruction.numpy()
    np.testing.assert_allclose(found, recon, atol=1e-4 * np.abs(recon).max())


def test_scales_of_features_that_never_fire() -> None:
    sae = make(TopK(k=1))
    scales = feature_scales(sae, torch.from_numpy(rows_for(0, D, n=3)))
    assert isinstance(scales, FeatureScales)
    assert int((scales.mean > 0).sum()) <= 3 and torch.isfinite(scales.sd).all()
