"""Labelled texts and their activations: files of every kind, the split, and a slow recapture."""

import dataclasses
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from probe.capture import capturing
from probe.errors import Failure, UserError
from probe.language import LanguageModel
from probe.runs import Run, verify
from probe.sites import parse_site
from probe.toy import tiny_llama
from saes.labelled_texts import (
    BUILTIN_GROUPS,
    LabelledText,
    first_letter_words,
    read_labelled,
    split_texts,
    two_groups,
)
from saes.tasks import (
    WORD_PROMPT,
    TaskConfig,
    load_task,
    part_name,
    task_name,
    write_task,
)

MODEL = {"spec": "tiny-llama", "random_weights": None, "dtype": "float32"}
SITE = "resid_post.0"
ROWS = [
    {"text": "a, “quoted”\nline", "kind": "x", "who": "m"},
    {"text": "second text", "kind": "y", "who": "f"},
    {"text": "third", "kind": "x", "who": "f"},
]


def write_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        lines = [",".join(rows[0])]
        lines += [",".join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\ufeff" + "\n".join(lines))
    return str(path)


# ------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    source = write_rows(tmp_path / f"texts{suffix}", ROWS)
    found = read_labelled(source, "kind", "who")
    assert [(t.text, t.label, t.attribute) for t in found] == [
        (row["text"], row["kind"], row["who"]) for row in ROWS
    ]
    assert [t.attribute for t in read_labelled(source, "kind", None)] == ["", "", ""]


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    source = write_rows(
        tmp_path / "n.jsonl", [{"text": "one", "kind": 0}, {"text": "b", "kind": 1}]
    )
    assert [t.label for t in read_labelled(source, "kind", None)] == ["0", "1"]


def test_a_text_that_stands_there_twice_is_one(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "twice.jsonl", [ROWS[0], ROWS[1], ROWS[0]])
    assert len(read_labelled(source, "kind", None)) == 2
    other = write_rows(tmp_path / "torn.jsonl", [ROWS[0], ROWS[0] | {"kind": "y"}])
    with pytest.raises(UserError, match=r"torn.jsonl:2 is the same text as torn.jsonl:1"):
        read_labelled(other, "kind", None)


@pytest.mark.parametrize(
    ("rows", "label", "message"),
    [
        ([{"text": "a", "kind": "x"}], "sort", "no `sort`; its columns are: text, kind"),
        ([{"kind": "x"}], "kind", "no `text`"),
        ([{"text": "a", "kind": " "}], "kind", "no `kind`"),
        ([{"text": "a", "kind": None}], "kind", "no `kind`"),
    ],
)
def test_a_missing_value_is_named(tmp_path: Path, rows: list, label: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_labelled(write_rows(tmp_path / "bad.jsonl", rows), label, None)


def test_a_file_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        read_labelled(str(tmp_path / "none.csv"), "kind", None)
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(UserError, match="wanted builtin, or a file ending in"):
        read_labelled(str(tmp_path / "notes.md"), "kind", None)
    for name, content in (("a.jsonl", "{not json"), ("b.jsonl", "[1, 2]"), ("c.parquet", "PAR")):
        (tmp_path / name).write_text(content)
        with pytest.raises(Failure, match=f"{name} is damaged or not"):
            read_labelled(str(tmp_path / name), "kind", None)


def test_builtin_groups_are_of_the_builtin_corpus() -> None:
    texts = read_labelled("builtin", "form", "topic")
    for column, values in (
        ("form", {text.label for text in texts}),
        ("topic", {text.attribute for text in texts}),
    ):
        first, second = (set(group) for group in BUILTIN_GROUPS[column].values())
        assert first <= values and second <= values and not first & second
        assert two_groups(values, "builtin", column) is BUILTIN_GROUPS[column]


def test_two_groups_are_the_most_frequent_values() -> None:
    groups = two_groups(["a", "c", "b", "c", "b", "c"], "mine.csv", "kind")
    assert groups == {"c": ("c",), "b": ("b",)}
    with pytest.raises(UserError, match="single value"):
        two_groups(["a", "a"], "mine.csv", "kind")


def test_first_letter_words_by_hand() -> None:
    vocabulary = [" the", "the", " The", " of", " an1", " été", " zoo", " a b", "", " the", " tea"]
    found = first_letter_words(vocabulary)
    assert [(word.text, word.label) for word in found] == [
        (" the", "t"), (" zoo", "z"), (" tea", "t")
    ]  # fmt: skip
    assert found[1].id == "6"
    with pytest.raises(UserError, match="no single-token words"):
        first_letter_words([chr(i) for i in range(256)])


# ------------------------------------------------------------------------------ the split


def numbered(n: int, label: str) -> list[LabelledText]:
    return [LabelledText(id=f"{label}{i}", text=f"{label} text {i}", label=label) for i in range(n)]


def test_the_split_depends_on_the_texts_and_not_on_their_order() -> None:
    texts = numbered(40, "a") + numbered(30, "b") + numbered(3, "rare")

    def split(texts: list[LabelledText], max_per_class: int | None = 20, seed: int = 1):
        return split_texts(
            texts, max_per_class=max_per_class, min_per_class=5, test_share=0.3, seed=seed
        )

    found = split(texts)
    assert {t.label: sum(u.label == t.label for u in found) for t in found} == {"a": 20, "b": 20}
    assert sum(t.test for t in found if t.label == "a") == 6
    shuffled = random.Random(0).sample(texts, len(texts))
    assert split(shuffled) == found
    more = split(texts, max_per_class=None)
    assert {t.text for t in found} < {t.text for t in more}
    other = split(texts, seed=2)
    assert {t.text for t in other} != {t.text for t in found}


def test_too_few_texts_of_too_few_labels() -> None:
    with pytest.raises(UserError, match=r"two labels with at least 10 .* a \(12\), b \(4\)"):
        split_texts(
            numbered(12, "a") + numbered(4, "b"),
            max_per_class=None, min_per_class=10, test_share=0.5, seed=0,
        )  # fmt: skip


# ------------------------------------------------------------------------------ capturing


@pytest.fixture
def source(tmp_path: Path) -> str:
    letters = random.Random(3)
    rows = [
        {
            "text": "".join(letters.choice("abcd ") for _ in range(letters.randint(3, 30)))
            + str(i),
            "kind": "even" if i % 2 == 0 else "odd",
        }
        for i in range(60)
    ]
    return write_rows(tmp_path / "texts.jsonl", rows)


def capture(parent: Path, config: TaskConfig, model: LanguageModel):
    run = Run.create(parent, task_name(config), config.run_config())
    return run, write_task(run, config, model, progress=False)


def alone(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """A text's activations, run without any other beside it."""
    site = parse_site(SITE)
    with torch.no_grad(), capturing(model, [site]) as seen:
        model.run(torch.tensor([tokens]))
    return seen[site][0]


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_rows_are_those_of_each_text_run_alone(
    tmp_path: Path, llama: LanguageModel, source: str, pool
) -> None:
    config = TaskConfig(
        model=MODEL, site=SITE, source=source, label="kind", attribute=None, pool=pool,
        context=20, min_per_class=4, batch_texts=2, max_norm=0.0,
    )  # fmt: skip
    run, data = capture(tmp_path, config, llama)
    assert run.complete and verify(run) == []
    assert run.summary["n_parts"] == 2
    assert data.n_texts == 60 and int(data.test.sum()) == 18
    texts = {t.id: t for t in read_labelled(source, "kind", None)}
    by_text = {t.text: t for t in texts.values()}
    for number, name in enumerate(data.names):
        text = by_text.get(name) or texts[name]
        tokens = llama.tokenizer(text.text)["input_ids"][:20]
        rows = alone(llama, tokens)
        expected = rows[1:] if pool == "mean" else rows[-1:]
        torch.testing.assert_close(data.rows[data.text == number], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(data.pooled()[number], expected.mean(0), rtol=1e-4, atol=1e-5)
        assert data.labels[number] == text.label


def test_a_killed_capture_goes_on(tmp_path: Path, llama: LanguageModel, source: str) -> None:
    config = TaskConfig(
        model=MODEL, site=SITE, source=source, label="kind", attribute=None, batch_texts=2,
        min_per_class=4,
    )  # fmt: skip
    run, data = capture(tmp_path, config, llama)
    first = run.path / part_name(0)
    written = first.stat().st_mtime_ns
    (run.path / "manifest.json").unlink()
    (run.path / part_name(1)).unlink()
    again = write_task(run, config, llama, progress=False)
    assert first.stat().st_mtime_ns == written
    assert torch.equal(again.rows, data.rows) and again.labels == data.labels
    # Complete, it is read: a model with other weights changes nothing.
    assert torch.equal(write_task(run, config, tiny_llama(9), progress=False).rows, data.rows)
    (run.path / part_name(1)).unlink()
    with pytest.raises(Failure, match="cannot be read"):
        load_task(run)


def test_outliers_are_left_out_unless_nothing_else_is_there(
    tmp_path: Path, llama: LanguageModel, source: str
) -> None:
    config = TaskConfig(
        model=MODEL, site=SITE, source=source, label="kind", attribute=None, min_per_class=4,
        max_norm=1.0,
    )  # fmt: skip
    _, data = capture(tmp_path, config, llama)
    _, all_rows = capture(
        tmp_path,
        dataclasses.replace(config, max_norm=0.0),
        llama,
    )
    assert len(data.rows) < len(all_rows.rows)
    assert set(data.text.tolist()) == set(range(60))
    assert data.rows.norm(dim=1).median() < all_rows.rows.norm(dim=1).median()


def test_a_text_of_one_token_has_no_activation(tmp_path: Path, llama: LanguageModel) -> None:
    rows = [{"text": "long enough" * i, "kind": i % 2} for i in range(1, 30)]
    source = write_rows(tmp_path / "t.jsonl", [*rows, {"text": "x", "kind": 0}])
    config = TaskConfig(
        model=MODEL, site=SITE, source=source, label="kind", attribute=None, min_per_class=4
    )
    with pytest.raises(UserError, match=r"t.jsonl:30 has a single token"):
        capture(tmp_path, config, llama)


def test_first_letter_words_are_read_at_the_word(tmp_path: Path) -> None:
    model = with_words([f" {a}{b}a" for a in "pqr" for b in "abcdefgh"])
    config = TaskConfig(
        model=MODEL, site=SITE, source="first_letter", label="", attribute=None, pool="last",
        min_per_class=8, test_share=0.25,
    )  # fmt: skip
    _, data = capture(tmp_path, config, model)
    assert sorted(set(data.labels)) == ["p", "q", "r"] and int(data.test.sum()) == 6
    prompt = model.tokenizer(WORD_PROMPT)["input_ids"]
    for number in (0, 7, 23):
        token = model.tokenizer.get_vocab()[data.names[number]]
        torch.testing.assert_close(
            data.rows[number], alone(model, [*prompt, token])[-1], rtol=1e-4, atol=1e-5
        )


def with_words(words: list[str]) -> LanguageModel:
    """A tiny Llama whose tokenizer has these words as tokens."""
    model = tiny_llama()
    model.tokenizer.add_tokens(words)
    torch.manual_seed(0)
    model.model.resize_token_embeddings(257 + len(words), mean_resizing=False)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_share": 0.0}, "test_share"),
        ({"test_share": 1.0}, "test_share"),
        ({"context": 1}, "context"),
        ({"min_per_class": 1}, "min_per_class"),
        ({"max_per_class": 3}, "max_per_class"),
        ({"source": "first_letter", "pool": "mean"}, "set pool to last"),
    ],
)
def test_a_config_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskConfig(model=MODEL, site=SITE, **options)


def test_another_file_is_another_run(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "t.jsonl", ROWS)
    config = TaskConfig(model=MODEL, site=SITE, source=source, label="kind")
    before = config.run_config()
    write_rows(tmp_path / "t.jsonl", ROWS[:2])
    assert config.run_config() != before
