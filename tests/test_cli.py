"""The command line as a person meets it: folders on stdout, sentences on stderr, exit statuses."""

import contextlib
import io
import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from app.cli import COMMANDS, dispatch
from probe.runs import Run, find_runs
from probe.toy import tiny_llama
from saes.activations import NAMES, Activation
from saes.folder import load_sae

TEXT = "The quick brown fox jumps over the lazy dog, again and again. "
SMALL_TRAIN = ("--d-sae", "64", "--k", "4", "--steps", "6", "--batch-size", "64")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny local model and a corpus."""
    folder = tmp_path_factory.mktemp("cli")
    tiny = tiny_llama()
    tiny.model.save_pretrained(folder / "tiny")
    tiny.tokenizer.save_pretrained(folder / "tiny")
    lines = [json.dumps({"id": f"d{i}", "text": TEXT * 6 + str(i)}) for i in range(30)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> dict[str, str]:
    """A store, an SAE, its twin, an evaluation and an index, made by the commands themselves.

    The first runs as a program of its own, the others in this process: importing takes seconds.
    """
    root = ("--root", str(place / "artifacts"))
    model, corpus = str(place / "tiny"), str(place / "corpus.jsonl")
    sizes = ("--sites", "resid_post.0", "mlp_act.1", "--context", "32", "--dtype", "float32")
    folders = {}

    def call(name: str, *arguments: str) -> None:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert not dispatch([*arguments, *root])
        folders[name] = output.getvalue().strip().splitlines()[-1]

    command = [sys.executable, "-m", "app.cli", "capture", model, corpus, *sizes, *root]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders["store"] = done.stdout.strip().splitlines()[-1]
    call("twin_store", "capture", model, corpus, *sizes, "--random-weights", "1")
    site = ("--site", "resid_post.0")
    call("sae", "train", folders["store"], *site, *SMALL_TRAIN)
    call("twin", "train", folders["twin_store"], *site, *SMALL_TRAIN)
    small = ("--n-ce-tokens", "128", "--n-rows", "500", "--n-resamples", "20")
    call("evaluation", "evaluate", folders["sae"], "--twin", folders["twin"], *small)
    call("index", "index", folders["sae"])
    return folders


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: exit status, stdout, stderr."""
    try:
        status = dispatch(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_every_command_leaves_a_complete_run_and_names_it(made, place):
    kinds = {name: Run.open(Path(folder)).kind for name, folder in made.items()}
    assert kinds == {
        "store": "activations",
        "twin_store": "activations",
        "sae": "sae",
        "twin": "sae",
        "evaluation": "evaluation",
        "index": "index",
    }
    assert all(Run.open(Path(folder)).complete for folder in made.values())
    assert {str(run.path) for run in find_runs(place / "artifacts")} == set(made.values())
    assert Path(made["index"]).parent == Path(made["evaluation"]).parent == Path(made["sae"])


def test_evaluation_lists_sae_and_controls(made):
    measured = json.loads((Path(made["evaluation"]) / "metrics.json").read_text())
    names = [row["name"] for row in measured["rows"]]
    assert names == ["sae", "pca", "random_dictionary", "mean", "random_weight_twin"]
    by_name = {row["name"]: row for row in measured["rows"]}
    assert by_name["sae"]["l0"] <= 4
    assert by_name["mean"]["fvu"] == pytest.approx(1, abs=0.1)


def test_runs_lists_them(made, place, capsys):
    status, out, _ = said(capsys, "runs", "--root", str(place / "artifacts"), "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {row["path"] for row in rows} == set(made.values())
    assert all(row["complete"] for row in rows)
    _, out, err = said(capsys, "runs", "--root", str(place / "nothing"))
    assert out == "" and "lorgnette demo" in err


def test_the_same_question_finds_the_same_folder(made, place, capsys):
    status, out, _ = said(
        capsys, "train", made["store"], "--site", "resid_post.0", *SMALL_TRAIN,
        "--root", str(place / "artifacts"),
    )  # fmt: skip
    assert (status, out.strip()) == (0, made["sae"])


def test_doctor_passes_and_fails_on_a_flipped_byte(made, place, capsys):
    root = ("--root", str(place / "artifacts"))
    status, out, err = said(capsys, "doctor", *root)
    assert status == 0, out + err
    path = Path(made["sae"]) / "sae_weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    status, out, err = said(capsys, "doctor", *root)
    path.write_bytes(whole)
    assert status == 1
    assert "damaged" in out and "1 of" in err
    assert said(capsys, "doctor", *root)[0] == 0


def test_dry_runs_write_nothing(made, place, capsys):
    before = sorted((place / "artifacts").rglob("*"))
    root = ("--root", str(place / "artifacts"), "--dry-run")
    model, corpus = str(place / "tiny"), str(place / "corpus.jsonl")
    for arguments in [
        ("capture", model, corpus, "--sites", "resid_*.1", "--context", "16"),
        ("train", made["store"], "--site", "resid_post.0", "--steps", "7"),
        ("train", model, "--corpus", corpus, "--site", "mlp_out.0"),
        ("evaluate", made["sae"], "--n-rows", "77"),
        ("index", made["sae"]),
        ("demo",),
        ("dashboard", "--port", str(free_port())),
        ("make", "corpus"),
        ("doctor",),
    ]:
        status, out, err = said(capsys, *arguments, *root)
        assert status == 0, err
        assert out == "" or arguments[0] == "doctor"
        assert len(err + out) > 30, arguments
    assert sorted((place / "artifacts").rglob("*")) == before


def test_training_straight_from_a_model(place, capsys):
    status, out, err = said(
        capsys, "train", str(place / "tiny"), "--corpus", str(place / "corpus.jsonl"),
        "--site", "resid_post.1", *SMALL_TRAIN, "--context", "32", "--buffer-rows", "256",
        "--root", str(place / "streamed"),
    )  # fmt: skip
    assert status == 0, err
    run = Run.open(Path(out.strip()))
    assert run.complete and "store" not in run.config["source"]
    status, _, err = said(capsys, "index", out.strip(), "--root", str(place / "streamed"))
    assert status == 2 and "was trained on a stream" in err


ACTIVATION_OPTIONS = {
    "topk": ("--k", "4", "--multi"),
    "batch_topk": ("--k", "4"),
    "matryoshka": ("--k", "4", "--prefixes", "8", "16"),
    "top_afa": ("--afa", "0.1"),
    "jump_relu": ("--l0", "0.01"),
    "gated": ("--l1", "0.01"),
    "relu": ("--l1", "0.01"),
    "k_sparse": ("--k", "4", "--alpha", "2"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_by_name(name, made, place, capsys):
    status, out, err = said(
        capsys, "train", made["store"], "--site", "resid_post.0", "--activation", name,
        *ACTIVATION_OPTIONS[name], "--d-sae", "32", "--steps", "3", "--batch-size", "64",
        "--root", str(place / "artifacts"),
    )  # fmt: skip
    assert status == 0, err
    run = Run.open(Path(out.strip()))
    assert run.complete and run.config["train"]["activation"]["name"] == name
    assert load_sae(run.path).config.activation == activation_of(name)


def activation_of(name: str) -> Activation:
    """What the options above ask for."""
    activation = NAMES[name]()
    asked = {
        "topk": {"k": 4, "multi": True}, "batch_topk": {"k": 4}, "top_afa": {"afa": 0.1},
        "matryoshka": {"k": 4, "prefixes": (8, 16)}, "jump_relu": {"l0": 0.01},
        "gated": {"l1": 0.01}, "relu": {"l1": 0.01}, "k_sparse": {"k": 4, "alpha": 2.0},
    }  # fmt: skip
    return replace(activation, **asked[name])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_help_teaches(capsys):
    status, out, _ = said(capsys)
    assert status == 0
    assert all(name in out for name in COMMANDS)
    for name in COMMANDS:
        status, out, _ = said(capsys, name, "--help")
        assert status == 0
        assert "Example" in out or "lorgnette train" in out, name
        assert "--root" in out and "--dry-run" in out, name


def test_help_does_not_wait_for_torch():
    code = "import sys, app.cli; app.cli.usage(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_mistakes_are_one_sentence_and_status_2(made, place, capsys):
    root = ("--root", str(place / "artifacts"))
    model, corpus = str(place / "tiny"), str(place / "corpus.jsonl")
    (place / "empty.txt").write_text(" ")
    busy = socket.socket()
    busy.bind(("127.0.0.1", 0))
    busy.listen()
    before = sorted((place / "artifacts").iterdir())
    mistakes = {
        ("nonsense",): "is no command",
        ("capture", "nobody/nothing", corpus): "is not known: wanted smollm2",
        ("capture", model, "missing.txt"): "is not there",
        ("capture", model, str(place / "empty.txt")): "has no text",
        (
            "capture",
            model,
            corpus,
            "--sites",
            "mlp_out.0",
            "--tokens",
            "0",
        ): "tokens must be at least 1",
        ("capture", model, corpus, "--sites", "resid_post.9"): "is not in this model",
        ("capture", model, corpus, "--sites", "residual.1"): "is not known: wanted resid_pre",
        ("capture", model, corpus, "--sites", "module:nope"): "names no module",
        ("capture", model, corpus, "--device", "abacus"): "is not to be had",
        ("train", made["store"]): "holds several sites",
        ("train", made["store"], "--site", "resid_post.1"): "holds no site",
        ("train", str(place)): "is not a folder that lorgnette wrote",
        ("train", made["sae"]): "where 'activations' was wanted",
        ("train", made["store"], "--site", "resid_post.0", "--k", "9999"): "cannot be active",
        ("train", made["store"], "--site", "resid_post.0", "--batch-size", "0"): "at least 1",
        ("train", made["store"], "--site", "resid_post.0", "--steps", "0"): "at least 1",
        ("train", made["store"], "--site", "mlp_act.1", "--batch-size", "99999"): "fewer than one",
        ("train", model, "--corpus", corpus): "needs a --site",
        ("index", made["store"]): "where 'sae' was wanted",
        ("index", "smollm2-nothing"): "is no folder of kind 'sae'",
        ("evaluate", made["sae"], "--held-out-share", "0"): "between 0 and 1",
        ("evaluate", made["sae"], "--held-out-share", "0.5"): "was trained on; its training held",
        ("dashboard", "--port", str(busy.getsockname()[1])): "is in use",
        ("dashboard", "--port", "99999"): "must be 1 to 65535",
    }
    for arguments, sentence in mistakes.items():
        options = () if arguments[0] == "nonsense" else root
        status, out, err = said(capsys, *arguments, *options)
        assert status == 2, (arguments, err)
        assert out == "", arguments
        assert sentence in err, (arguments, err)
        assert "Traceback" not in err, arguments
    busy.close()
    assert sorted((place / "artifacts").iterdir()) == before
    status, _, err = said(capsys, "capture", model, "--tokns", "3")
    assert status == 2 and "--tokens" in err


def test_an_sae_meets_a_store_of_another_width(made, place, capsys):
    root = ("--root", str(place / "wide"))
    tiny = tiny_llama(d_model=48)
    tiny.model.save_pretrained(place / "wider")
    tiny.tokenizer.save_pretrained(place / "wider")
    status, out, err = said(
        capsys, "capture", str(place / "wider"), str(place / "corpus.jsonl"),
        "--sites", "resid_post.0", "--context", "32", *root,
    )  # fmt: skip
    assert status == 0, err
    for command in ("evaluate", "index"):
        status, _, err = said(
            capsys, command, made["sae"], "--store", out.strip(),
            "--root", str(place / "artifacts"),
        )  # fmt: skip
        assert status == 2 and "width" in err, err


def test_damage_is_status_1(made, place, capsys):
    root = ("--root", str(place / "artifacts"))
    path = Path(made["store"]) / "rows-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    status, _, err = said(capsys, "train", made["store"], "--site", "resid_post.0", *root)
    path.write_bytes(whole)
    assert status == 1 and "should have" in err
    manifest = Path(made["sae"]) / "manifest.json"
    text = manifest.read_text()
    manifest.write_text("{")
    status, _, err = said(capsys, "index", made["sae"], *root)
    manifest.write_text(text)
    assert status == 1 and "not valid JSON" in err


def test_nobody_sees_a_traceback(monkeypatch, capsys):
    from app.commands import runs

    def broken(command):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(runs, "run", broken)
    monkeypatch.delenv("LORGNETTE_DEBUG", raising=False)
    status, out, err = said(capsys, "runs")
    assert (status, out) == (1, "")
    assert "ZeroDivisionError: by zero" in err and "LORGNETTE_DEBUG" in err
    monkeypatch.setenv("LORGNETTE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        dispatch(["runs"])
