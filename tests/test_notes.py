"""Labels, notes and lists: nothing that a person wrote is ever lost."""

import csv
import io
import json
import multiprocessing
import os
import sqlite3
import tempfile
import threading
from pathlib import Path

import pytest

from probe.errors import Failure, UserError
from saes.note_files import parse_document
from saes.notes import Conflict, Member, Merged, Note, Notes

SAE = "smollm2-topk-1a2b3c4d"
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def notes(tmp_path) -> Notes:
    return Notes(tmp_path / "notes.sqlite")


# -------------------------------------------------------------------------------------- texts


def test_nothing_is_written_by_looking(notes):
    assert notes.note(SAE, 7) == Note(label="", note="", version=0, changed="")
    assert notes.history(SAE, 7) == [] and notes.labels(SAE) == {} and notes.lists() == {}
    assert notes.lists_of(SAE, 7) == [] and notes.revision() == 0
    assert notes.export() == {
        "kind": "lorgnette notes", "schema": 1, "features": [], "lists": [],
    }  # fmt: skip
    assert not list(notes.path.parent.iterdir())


def test_a_text_is_there_for_the_next_process_and_its_versions_stay(notes):
    first = notes.save(SAE, 7, label="boats", note="", version=0)
    second = notes.save(SAE, 7, label="boats, ferries", note="line\nbreak", version=1)
    again = Notes(notes.path)
    assert (first.version, second.version) == (1, 2)
    assert again.note(SAE, 7) == second and again.history(SAE, 7) == [first, second]
    assert again.note(SAE, 8).version == 0 and again.note("another", 7).version == 0


def test_labels_are_the_latest_ones_and_emptied_ones_are_none(notes):
    notes.save(SAE, 7, label="boats", note="", version=0)
    notes.save(SAE, 12, label="ten", note="", version=0)
    notes.save(SAE, 12, label="", note="only a note", version=1)
    notes.save("another", 3, label="theirs", note="", version=0)
    for version in range(11):  # version 10 is later than version 9, though "9" > "10"
        notes.save(SAE, 99, label=f"v{version + 1}", note="", version=version)
    assert notes.labels(SAE) == {7: "boats", 99: "v11"}


def test_saving_over_a_version_that_changed_raises_and_keeps_both(notes):
    notes.save(SAE, 7, label="first tab", note="hers", version=0)
    with pytest.raises(Conflict, match=r"saved meanwhile.*'first tab'.*save again") as raised:
        notes.save(SAE, 7, label="second tab", note="his", version=0)
    theirs = raised.value.theirs
    assert isinstance(raised.value, UserError)
    assert (theirs.label, theirs.note, theirs.version) == ("first tab", "hers", 1)
    assert notes.note(SAE, 7) == theirs, "a conflict writes nothing"
    notes.save(SAE, 7, label="second tab", note="his", version=theirs.version)
    assert [text.label for text in notes.history(SAE, 7)] == ["first tab", "second tab"]


def test_the_same_text_twice_is_one_version(notes):
    saved = notes.save(SAE, 7, label="boats", note="", version=0)
    assert notes.save(SAE, 7, label=" boats ", note="", version=0) == saved
    assert len(notes.history(SAE, 7)) == 1 and notes.revision() == 1


def test_a_label_is_one_line_and_a_note_is_not(notes):
    saved = notes.save(SAE, 0, label=" two\n lines ", note=" a\r\nb \n", version=0)
    assert (saved.label, saved.note) == ("two lines", "a\nb")
    odd = notes.save(SAE, 1, label="<b>'\"; DROP TABLE versions; --", note="π 🙂", version=0)
    assert notes.note(SAE, 1) == odd


@pytest.mark.parametrize(
    ("feature", "label", "note", "sentence"),
    [
        (0, "x" * 201, "", "a label has 200 characters at most; got 201"),
        (0, "", "x" * 20_001, "a note has 20,000 characters at most"),
        (0, "a\0b", "", "no text"),
        (0, "", "\ud800", "no text"),
        (-1, "a", "", "a feature is a number from 0"),
        (2**31, "a", "", "a feature is a number from 0"),
    ],
)
def test_what_cannot_be_stored_is_refused(notes, feature, label, note, sentence):
    with pytest.raises(UserError, match=sentence):
        notes.save(SAE, feature, label=label, note=note, version=0)
    assert not notes.path.exists()


# -------------------------------------------------------------------------------------- lists


def test_lists_gain_and_lose_members(notes):
    notes.add("sea", SAE, 7, "the clearest")
    notes.add("sea", SAE, 3)
    notes.add("sea", "another", 7)
    notes.add("to check", SAE, 7)
    assert notes.lists() == {"sea": 3, "to check": 1} and notes.lists(SAE)["sea"] == 2
    assert notes.lists_of(SAE, 7) == ["sea", "to check"]
    assert notes.members("sea") == [
        Member(sae=SAE, feature=7, note="the clearest"),
        Member(sae=SAE, feature=3, note=""),
        Member(sae="another", feature=7, note=""),
    ]
    notes.remove("to check", SAE, 7)
    notes.remove("to check", SAE, 7)
    assert notes.lists() == {"sea": 3}
    with pytest.raises(UserError, match="no list named 'to check'; lists are: 'sea'"):
        notes.members("to check")
    with pytest.raises(UserError, match="a list needs a name"):
        notes.add("  ", SAE, 7)


def test_many_features_at_once_and_a_note_that_stays(notes):
    notes.add("sea", SAE, 7, "the clearest")
    assert notes.add_all("sea", SAE, [7, 8, 9, 8]) == 2
    assert notes.members("sea")[0].note == "the clearest"
    notes.add("sea", SAE, 7, "not so clear")
    assert notes.members("sea")[0].note == "not so clear"
    with pytest.raises(UserError):
        notes.add_all("sea", SAE, [10, -1])
    assert notes.lists() == {"sea": 3}, "all or none"


def test_revision_grows_with_every_change_and_only_then(notes):
    seen = []
    for change in (
        lambda: notes.save(SAE, 7, label="a", note="", version=0),
        lambda: notes.save(SAE, 7, label="b", note="", version=1),
        lambda: notes.add("sea", SAE, 7),
        lambda: notes.remove("sea", SAE, 7),
    ):
        change()
        seen.append(notes.revision())
    assert seen == [1, 2, 3, 4]
    notes.remove("sea", SAE, 7)
    with pytest.raises(Conflict):
        notes.save(SAE, 7, label="c", note="", version=0)
    assert notes.revision() == 4


# ------------------------------------------------------------------- several writers at once


def hammer(path: Path, writer: str, rounds: int) -> None:
    """Save on top of whatever is there, again and again, and keep at it after a conflict."""
    notes = Notes(path)
    for number in range(rounds):
        version = notes.note(SAE, 7).version
        while True:
            try:
                notes.save(SAE, 7, label=f"{writer} {number}", note="", version=version)
                break
            except Conflict as conflict:
                version = conflict.theirs.version
        notes.add(f"list of {writer}", SAE, number)


def test_processes_that_write_the_same_feature_at_once_lose_nothing(notes):
    writers, rounds = ("a", "b", "c"), 12
    processes = [SPAWN.Process(target=hammer, args=(notes.path, w, rounds)) for w in writers]
    for process in processes:
        process.start()
    hammer(notes.path, "here", rounds)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    history, everyone = notes.history(SAE, 7), (*writers, "here")
    assert [text.version for text in history] == list(range(1, len(everyone) * rounds + 1))
    assert {text.label for text in history} == {f"{w} {n}" for w in everyone for n in range(rounds)}
    for writer in everyone:
        own = [text.label for text in history if text.label.startswith(f"{writer} ")]
        assert own == [f"{writer} {number}" for number in range(rounds)]
    assert notes.lists() == {f"list of {writer}": rounds for writer in everyone}
    with sqlite3.connect(notes.path) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_threads_of_one_dashboard_lose_nothing(notes):
    threads = [threading.Thread(target=hammer, args=(notes.path, w, 8)) for w in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text.version for text in notes.history(SAE, 7)] == list(range(1, 25))


def test_a_reader_does_not_wait_for_a_writer(notes):
    notes.save(SAE, 7, label="boats", note="", version=0)
    writer = sqlite3.connect(notes.path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("INSERT INTO versions VALUES (?, 7, 2, 'half', '', '')", (SAE,))
    assert notes.note(SAE, 7).label == "boats"
    writer.execute("ROLLBACK")
    writer.close()


def die_while_writing(path: Path) -> None:
    file = sqlite3.connect(path, isolation_level=None)
    file.execute("BEGIN IMMEDIATE")
    file.execute("INSERT INTO versions VALUES (?, 7, 2, 'half', '', '')", (SAE,))
    os._exit(9)


def test_a_writer_that_is_killed_leaves_what_was_there(notes):
    notes.save(SAE, 7, label="boats", note="", version=0)
    process = SPAWN.Process(target=die_while_writing, args=(notes.path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert notes.save(SAE, 7, label="ferries", note="", version=1).version == 2


# -------------------------------------------------------------------------- export and import


def filled(path: Path) -> Notes:
    notes = Notes(path)
    notes.save(SAE, 7, label="boats", note="", version=0)
    notes.save(SAE, 7, label="ferries", note='with, a "comma"\nand a line', version=1)
    notes.save("another", 2, label="=1+1", note="", version=0)
    notes.add("sea", SAE, 7, "clear")
    notes.add("sea", "another", 2)
    return notes


def test_an_export_loaded_elsewhere_is_the_same_again(tmp_path):
    here, there = filled(tmp_path / "here.sqlite"), Notes(tmp_path / "there.sqlite")
    document = here.export()
    text = json.dumps(document)
    assert there.load(parse_document(text)) == Merged(added=2, listed=2)
    assert there.export() == document
    assert there.history(SAE, 7) == here.history(SAE, 7)
    assert there.load(document) == Merged(same=2) and there.export() == document


def described(label: str, changed: str, **more: object) -> dict:
    version = {"label": label, "note": "", "changed": changed}
    feature = {"sae": SAE, "feature": 7, "versions": [version]}
    return {"kind": "lorgnette notes", "schema": 1, "features": [feature], "lists": []} | more


def test_the_text_that_was_saved_last_counts_and_the_other_one_stays(notes):
    mine = notes.save(SAE, 7, label="mine", note="", version=0)
    older = described("older", "2001-01-01T00:00:00+00:00")
    assert notes.load(older) == Merged(kept=1)
    assert notes.history(SAE, 7) == [mine]
    newer = described("newer", "2990-01-01T02:00:00+02:00")
    assert notes.load(newer) == Merged(updated=1)
    history = notes.history(SAE, 7)
    assert [(text.label, text.version) for text in history] == [("mine", 1), ("newer", 2)]
    assert history[1].changed == "2990-01-01T00:00:00.000+00:00"
    with pytest.raises(Conflict):  # a tab that was open all the while
        notes.save(SAE, 7, label="mine too", note="", version=1)


def test_lists_are_merged_and_a_note_is_not_overwritten(notes):
    notes.add("sea", SAE, 7, "mine")
    notes.add("sea", SAE, 8)
    members = [{"sae": SAE, "feature": n, "note": "theirs"} for n in (7, 8, 9)]
    document = described("x", "2020-01-01", lists=[{"name": "sea", "members": members}])
    assert notes.load(document) == Merged(added=1, listed=1)
    assert [member.note for member in notes.members("sea")] == ["mine", "theirs", "theirs"]


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ([], "the document has the keys kind, schema, features, lists; got list"),
        ({}, "the document has the keys .*; got none"),
        (described("x", "2020-01-01", more=1), "got kind, schema, features, lists, more"),
        (described("x", "2020-01-01", schema=2), "schema 1 can be read; got .* 2"),
        (described("x", "2020-01-01", kind="recipe"), "of kind 'lorgnette notes'"),
        (described("x", "2020-01-01", schema=True), "`schema` of the document is of type int"),
        (described("x", "yesterday"), "is a time such as .*; got 'yesterday'"),
        (described("x", "0001-01-01T00:00:00+14:00"), "is a time such as"),
        (described("x" * 300, "2020-01-01"), "a label has 200 characters at most"),
        (described("x", "2020-01-01", features=[{"sae": SAE}]), "a feature has the keys sae"),
        (described("x", "2020-01-01", lists=[{"name": "", "members": []}]), "needs a name"),
        (
            described("x", "2020-01-01", features=[{"sae": SAE, "feature": 7, "versions": []}]),
            "with a version or more",
        ),
        (
            described("x", "2020-01-01", features=2 * described("x", "2020-01-01")["features"]),
            "each feature once",
        ),
    ],
)
def test_a_document_that_is_not_ours_is_refused_whole(notes, document, sentence):
    notes.save(SAE, 7, label="mine", note="", version=0)
    before = notes.export()
    with pytest.raises(UserError, match=sentence):
        notes.load(document)
    assert notes.export() == before


def test_what_is_no_json_is_told():
    for text in ("{", b"\xff\xfe\xff", "[" * 100_000):
        with pytest.raises(UserError, match="this file is not JSON"):
            parse_document(text)


def test_labels_as_a_table(tmp_path):
    notes = filled(tmp_path / "notes.sqlite")
    rows = list(csv.reader(io.StringIO(notes.export_labels())))
    assert rows[0] == ["sae", "feature", "label", "note", "version", "changed"]
    assert [row[:5] for row in rows[1:]] == [
        ["another", "2", "=1+1", "", "1"],
        [SAE, "7", "ferries", 'with, a "comma"\nand a line', "2"],
    ]
    assert len(list(csv.reader(io.StringIO(notes.export_labels(SAE))))) == 2


# ------------------------------------------------------------------------------ damaged files


def test_a_damaged_file_is_told_and_left_as_it_is(tmp_path):
    notes = filled(tmp_path / "notes.sqlite")
    with sqlite3.connect(notes.path) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = notes.path.read_bytes()
    broken = whole[:4096] + b"\x17" * (len(whole) - 4096)
    for content in (b"this is not a database, but a text of some length" * 9, broken):
        notes.path.write_bytes(content)
        with pytest.raises(Failure, match=r"are damaged .* move the file away"):
            notes.note(SAE, 7)
        with pytest.raises(Failure, match="are damaged"):
            notes.save(SAE, 8, label="x", note="", version=0)
        assert notes.path.read_bytes() == content


def test_an_empty_file_is_a_new_one(notes):
    notes.path.touch()
    assert notes.labels(SAE) == {}
    assert notes.save(SAE, 7, label="x", note="", version=0).version == 1


def test_another_programs_file_and_another_schema_are_refused(notes):
    with sqlite3.connect(notes.path) as file:
        file.execute("CREATE TABLE bookmarks (url TEXT)")
    before = notes.path.read_bytes()
    for ask in (lambda: notes.note(SAE, 7), lambda: notes.add("sea", SAE, 7)):
        with pytest.raises(Failure, match="another program's"):
            ask()
    assert notes.path.read_bytes() == before
    notes.path.unlink()
    notes.add("sea", SAE, 7)
    with sqlite3.connect(notes.path) as file:
        file.execute("PRAGMA user_version = 2")
    with pytest.raises(Failure, match="schema 2 where this version reads 1"):
        notes.note(SAE, 7)


def test_a_folder_in_the_way_is_told(notes):
    notes.path.mkdir()
    with pytest.raises(Failure, match="cannot be opened or written"):
        notes.save(SAE, 7, label="x", note="", version=0)


def read_and_write(folder: str, found) -> None:
    """As a person who may only read the folder."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    notes = Notes(Path(folder) / "notes.sqlite")
    found.put(notes.note(SAE, 7).label)
    try:
        notes.save(SAE, 7, label="x", note="", version=2)
    except Failure as failure:
        found.put(str(failure))


def test_a_folder_that_may_only_be_read_is_read_and_told():
    with tempfile.TemporaryDirectory() as folder:
        filled(Path(folder) / "notes.sqlite")
        Path(folder).chmod(0o555)
        found = SPAWN.Queue()
        process = SPAWN.Process(target=read_and_write, args=(folder, found))
        process.start()
        assert found.get(timeout=60) == "ferries"
        assert "make the folder writable" in found.get(timeout=60)
        process.join(60)
        Path(folder).chmod(0o755)
