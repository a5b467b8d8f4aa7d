"""Labels from an endpoint, asked over real HTTP, and `lorgnette label` as a person meets it."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_tree import Tree, make_tree
from label_world import (
    ALWAYS,
    NOISE,
    RIVER,
    known_pool,
    make_sae_run,
    make_world,
    write_index,
)

from app import data
from app.cli import dispatch
from probe.errors import Failure, UserError
from probe.runs import Run
from probe.store import ActivationStore
from saes import label_endpoint
from saes.feature_queries import FeatureIndex
from saes.folder import load_sae
from saes.label_asking import asked_table, control_pairs, endpoint_labels, label_question
from saes.label_endpoint import Answers, Endpoint, parse_active, parse_label, score_prompt
from saes.label_pool import encode_pool
from saes.label_schema import LABELS, LabelConfig, read_labels
from saes.label_texts import Texts
from saes.labels import Subject

WORLD = make_world()


class Model(BaseHTTPRequestHandler):
    """Speaks the protocol: names the commonest marked token, finds it again in passages."""

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, ModelServer)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(body | {"key": self.headers["Authorization"], "path": self.path})
        status, said = server.troubles.pop(0) if server.troubles else (200, None)
        if status == 200:
            said = said or {"choices": [{"message": {"content": answer(body)}}]}
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def answer(body: dict) -> str:
    """What the model says: it reads only the prompt."""
    prompt = body["messages"][-1]["content"]
    passages = re.findall(r"^(\d+)\. (.*)$", prompt, flags=re.MULTILINE)
    if "<<like this>>" in prompt:
        marked = Counter(re.findall(r"<<(.*?)>>", "".join(text for _, text in passages)))
        return f'Sure! {{"label": "{marked.most_common(1)[0][0].strip() or "space"}"}}'
    found = re.search(r"fire on: (.*)", prompt)
    assert found is not None
    word = re.compile(rf"\b{re.escape(found[1])}\b")
    return json.dumps({"active": [int(n) for n, text in passages if word.search(text)]})


class ModelServer(ThreadingHTTPServer):
    """Remembers what it was asked; gives its troubles, in order, before answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Model)
        self.asked: list[dict] = []
        self.troubles: list[tuple[int, dict | None]] = []

    @property
    def url(self) -> str:
        """The base address."""
        return f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(label_endpoint, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ModelServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    index = write_index(make_sae_run(tmp_path_factory.mktemp("asked")), WORLD)
    texts = Texts(index, 0)
    return Subject(index, texts, LabelConfig(), known_pool(WORLD, texts, 40))


def endpoint_of(server: ModelServer, parallel: int = 1) -> Endpoint:
    return Endpoint(url=server.url, model="reader", key_variable="A_KEY", parallel=parallel)


# ---------------------------------------------------------------------------------- the protocol


def test_a_round_trip_labels_and_scores(subject, server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    endpoint, answers = endpoint_of(server, parallel=3), Answers(tmp_path / "answers.jsonl")
    features = [RIVER, NOISE]
    labels = endpoint_labels(subject, endpoint, answers, features, progress=False)
    assert labels[RIVER] == "river"
    table = asked_table(
        subject, labels, "endpoint", endpoint=endpoint, answers=answers, progress=False
    ).set_index("feature")
    river, noise = (table.loc[feature].to_dict() for feature in features)
    assert river["score"] == 1.0 and river["control"] < 0.8
    assert river["n_positive"] == river["n_negative"] == 10
    assert noise["score_low"] <= 0.5 <= noise["score_high"]
    asked = server.asked[0]
    assert asked["path"] == "/v1/chat/completions" and asked["key"] == "Bearer secret"
    assert asked["model"] == "reader" and asked["temperature"] == 0
    assert "secret" not in (tmp_path / "answers.jsonl").read_text()
    assert len(server.asked) == 2 + 4


def test_the_question_marks_what_fires_and_shows_nothing_that_is_tested(subject, server):
    prompt = label_question(subject, endpoint_of(server), RIVER)
    shown = re.findall(r"^\d+\. (.*)$", prompt, flags=re.MULTILINE)
    assert 0 < len(shown) <= 12
    assert all("<< river>>" in text for text in shown)
    assert set(re.findall(r"<<(.*?)>>", "".join(shown))) == {" river"}
    texts = subject.texts
    held_out = [
        "".join(texts.words.texts[token] for token in WORLD.tokens[row].tolist()).replace(
            "\n", "\\n"
        )
        for row in np.flatnonzero(texts.held_out)
    ]
    plain = [text.replace("<<", "").replace(">>", "") for text in shown]
    assert not any(text in sequence for text in plain for sequence in held_out)
    assert "' harbour', ' sea'" in prompt


def test_a_run_that_was_refused_goes_on_with_what_is_missing(subject, server, tmp_path):
    path, features = tmp_path / "answers.jsonl", [RIVER, NOISE, ALWAYS]
    server.troubles = [(200, None), (401, {"error": {"message": "no such key"}})]
    with pytest.raises(Failure, match=r"401 \(no such key\); check the key in .* A_KEY; 1 answers"):
        endpoint_labels(subject, endpoint_of(server), Answers(path), features, progress=False)
    with path.open("a") as file:
        file.write('{"step": "label", "feat')
    before = len(server.asked)
    labels = endpoint_labels(subject, endpoint_of(server), Answers(path), features, progress=False)
    assert set(labels) == set(features) and len(server.asked) == before + 2
    again = endpoint_labels(subject, endpoint_of(server), Answers(path), features, progress=False)
    assert again == labels and len(server.asked) == before + 2


def test_a_busy_endpoint_is_asked_again_and_then_given_up(server):
    server.troubles = [(429, {"error": "slow down"}), (503, {})]
    asked = score_prompt("river", ["a river", "a stone"])
    assert endpoint_of(server).ask(asked) == '{"active": [1]}' and len(server.asked) == 3
    server.asked.clear()
    server.troubles = [(500, {"error": "broken"})] * 9
    with pytest.raises(Failure, match=r"answered 500 \(broken\); wait, and run"):
        endpoint_of(server).ask("x")
    assert len(server.asked) == label_endpoint.TRIES


def test_endpoints_that_cannot_be_used_are_told_in_a_sentence(server):
    server.troubles = [(404, {"error": {"message": "no model"}}), (200, {"hello": 1})]
    with pytest.raises(Failure, match=r"404 \(no model\); check the address .* 'reader'"):
        endpoint_of(server).ask("x")
    with pytest.raises(Failure, match="does not answer as OpenAI's chat completions do"):
        endpoint_of(server).ask("x")
    gone = Endpoint(url="http://127.0.0.1:9/v1", model="m", timeout=1.0)
    with pytest.raises(
        Failure, match=r"127.0.0.1:9/v1 cannot be reached \(.*\); check the address"
    ):
        gone.ask("x")
    for url, model in (("ftp://x", "m"), ("http://x", "")):
        with pytest.raises(UserError, match="begins with http"):
            Endpoint(url=url, model=model)


def test_answers_as_models_write_them():
    assert parse_label('{"label": " Words\\nabout rivers "}') == "Words about rivers"
    assert parse_label('```json\n{"label": "a"}\n``` done') == "a"
    assert parse_label("Label: **rivers**\nbecause ...") == "rivers"
    assert parse_label('{"label": 3}') is None and parse_label("  ") is None
    assert parse_active('ok {"active": [3, 1]}', 3) == [True, False, True]
    assert parse_active('{"active": []}', 2) == [False, False]
    for bad in ("1, 2", '{"active": [4]}', '{"active": ["1"]}', '{"active": 1}', "{}"):
        assert parse_active(bad, 3) is None


def test_an_answer_that_cannot_be_read_leaves_the_feature_unscored(subject, server, tmp_path):
    nothing = {"choices": [{"message": {"content": "I cannot say."}}]}
    server.troubles = [(200, nothing)] * 4
    table = asked_table(
        subject, {RIVER: "river", NOISE: "x"}, "file", endpoint=endpoint_of(server),
        answers=Answers(tmp_path / "a.jsonl"), progress=False,
    )  # fmt: skip
    assert table["score"].dropna().empty and table["n_positive"].tolist() == [10, 10]
    plain = asked_table(subject, {RIVER: "river"}, "file", endpoint=None, answers=None)
    assert plain["label"].tolist() == ["river"] and plain["n_positive"].dropna().empty


def test_each_control_is_another_features():
    pairs = control_pairs([3, 5, 8, 9], 0)
    assert sorted(pairs) == sorted(pairs.values()) == [3, 5, 8, 9]
    assert all(feature != other for feature, other in pairs.items())
    assert control_pairs([3], 0) == {}


# ------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    return make_tree(tmp_path_factory.mktemp("label"))


def said(capsys: pytest.CaptureFixture[str], tree: Tree, *arguments: str) -> tuple[int, str, str]:
    """Label the tree's SAE: exit status, stdout, stderr."""
    try:
        status = dispatch(["label", str(tree.sae.path), "--root", str(tree.root), *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_labels_an_sae_and_the_dashboard_finds_it(tree, capsys, monkeypatch):
    monkeypatch.setenv("LORGNETTE_ROOT", str(tree.root))
    data.found_runs.clear()
    empty = data.auto_labels(data.sae_record(tree.sae.path.name))
    assert empty.empty and empty.columns.tolist() == LABELS.names
    status, out, err = said(capsys, tree, "--dry-run")
    assert status == 0 and out == "" and "of 64" in err and "256 sequences" in err
    status, out, err = said(capsys, tree)
    folder = Path(out.strip().splitlines()[-1])
    assert status == 0 and "median score" in err and folder.parent == tree.sae.path
    assert folder.name.startswith("labels-")
    table = read_labels(Run.open(folder))
    index = next(tree.sae.path.glob("index-*"))
    numbers = FeatureIndex.open(index).numbers()
    assert table["feature"].tolist() == numbers["feature"][numbers["alive"]].tolist()
    data.found_runs.clear()
    assert data.auto_labels(data.sae_record(tree.sae.path.name)).equals(table)
    assert said(capsys, tree)[1] == out


def test_the_pool_is_what_the_sae_says(tree):
    index = FeatureIndex.open(next(tree.sae.path.glob("index-*")))
    store = ActivationStore.open(next((tree.root / "activations").iterdir()))
    sae, texts = load_sae(tree.sae.path), Texts(index, 0)
    site = tree.sae.config["site"]
    pool = encode_pool(texts, sae, store, site, 5)
    assert [len(rows) for rows in pool.rows.values()] == [5, 5]
    wanted = {}
    for number in range(store.n_shards):
        shard = store.shard(number, site)
        with torch.inference_mode():
            codes = sae.encode(shard.values.float())
        for row, column in (codes.values > 0).nonzero().tolist():
            place = (int(shard.sequence[row]), int(shard.position[row]))
            wanted[int(codes.indices[row, column]), *place] = float(codes.values[row, column])
    inside = set(np.concatenate(list(pool.rows.values())).tolist())
    found = {}
    for feature in range(sae.config.d_sae):
        for flat, value in zip(*pool.firings.of(feature), strict=True):
            row, offset = divmod(int(flat), texts.stride)
            found[feature, row, offset - 2] = float(value)
    assert found == pytest.approx({key: v for key, v in wanted.items() if key[1] in inside})
    held_out = texts.held_out
    assert held_out[pool.rows["test"]].all() and not held_out[pool.rows["make"]].any()


def test_labels_from_a_file_and_from_an_endpoint(tree, capsys, server, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("feature,label\n3,winter\n5,copper\n")
    status, out, _ = said(capsys, tree, "--method", "file", "--file", str(path))
    table = read_labels(Run.open(Path(out.strip())))
    assert status == 0 and table["label"].tolist() == ["winter", "copper"]
    assert table["score"].dropna().empty
    assert set(table["method"]) == {"file"}
    there = ("--endpoint", server.url, "--endpoint-model", "reader")
    status, out, _ = said(capsys, tree, "--method", "endpoint", *there, "--features", "3", "5")
    table = read_labels(Run.open(Path(out.strip())))
    assert status == 0 and table["feature"].tolist() == [3, 5] and len(server.asked) == 6
    assert (Path(out.strip()) / "answers.jsonl").is_file()


def test_bad_requests_are_told_in_a_sentence(tree, capsys, tmp_path):
    unknown = tmp_path / "unknown.csv"
    unknown.write_text("feature,label\n64,x\n")
    gone = ("--endpoint", "http://127.0.0.1:9/v1", "--endpoint-model", "m")
    sentences = {
        ("--method", "magic"): "magic",
        ("--method", "file"): "needs --file",
        ("--file", str(unknown)): "--file goes with --method file",
        ("--method", "file", "--file", str(unknown)): "does not have: 64",
        ("--method", "endpoint"): "needs --endpoint",
        ("--method", "endpoint", "--endpoint", "http://x"): "go together",
        ("--endpoint", "http://x", "--endpoint-model", "m"): "the method is offline",
        ("--features", "3"): "goes with --method endpoint",
        ("--method", "endpoint", *gone, "--features", "99"): "only living features of 0 to 63",
        ("--pool-sequences", "-1"): "must be 0 or more",
    }
    before = set(tree.sae.path.iterdir())
    for arguments, sentence in sentences.items():
        status, out, err = said(capsys, tree, *arguments)
        assert status == 2 and out == "" and sentence in " ".join(err.split()), (arguments, err)
    assert set(tree.sae.path.iterdir()) == before


def test_an_sae_without_an_index_says_what_to_run(tree, capsys):
    status, _, err = said(capsys, Tree(root=tree.root, sae=tree.unfinished, unfinished=tree.sae))
    assert status == 1 and "still in training" in err
    index = next(tree.sae.path.glob("index-*"))
    manifest = (index / "manifest.json").rename(index / "hidden")
    status, _, err = said(capsys, tree)
    manifest.rename(index / "manifest.json")
    assert status == 2 and "no complete feature index" in err and "lorgnette index" in err
