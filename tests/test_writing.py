import pytest
import torch

from probe import writing
from probe.corpora import read_documents
from probe.errors import UserError
from probe.runs import verify
from probe.toy import byte_tokenizer, tiny_llama
from probe.writing import AnswerFilter, WritingConfig, prompt_batches, sample, whole, write_corpus


def test_whole_cuts_at_the_last_sentence():
    assert whole('He said "No." Then he') == 'He said "No."'
    assert whole("- one\n- two\n- thr") == "- one\n- two"
    assert whole("pi is 3.14 and") == "pi is 3.14 and"


def test_prompts_cover_every_pair_once_a_round():
    config = WritingConfig(rounds=2, batch=64)
    pairs = [pair for batch in prompt_batches(config) for pair in batch]
    n = len(writing.FORMS) * len(writing.TOPICS)
    assert len(pairs) == 2 * n
    assert len(set(pairs[:n])) == len(set(pairs[n:])) == n
    assert pairs[:n] != pairs[n:]
    assert pairs == [pair for batch in prompt_batches(config) for pair in batch]


def test_filter_drops_short_looping_and_repeated_answers():
    def row(text):
        return {"id": "x", "text": text}

    kept = AnswerFilter(byte_tokenizer())
    fresh = " ".join(f"word{i}" for i in range(60))
    kept.add([row("too short"), row("again and again " * 30), row(fresh), row(fresh + " more")])
    assert kept.dropped == {"short": 1, "loop": 1, "duplicate": 1}
    assert [r["text"] for r in kept.rows] == [fresh]
    assert kept.n_tokens == len(fresh)  # one byte a token


def test_sampling_stays_among_the_top_and_follows_its_generator():
    logits = torch.tensor([[0.0, 5.0, 4.9, -3.0]]).expand(200, 4)
    draw = sample(logits, 1.0, 2, torch.Generator().manual_seed(0))
    assert set(draw.flatten().tolist()) == {1, 2}
    again = sample(logits, 1.0, 2, torch.Generator().manual_seed(0))
    assert torch.equal(draw, again)
    # odds of the two are e^0.1 : 1, so the first is drawn 52.5 % of the time
    share = (sample(logits.repeat(50, 1), 1.0, 2, torch.Generator().manual_seed(1)) == 1).double()
    assert share.mean().item() == pytest.approx(0.525, abs=0.02)


def test_batched_sampling_equals_one_by_one(llama):
    """Left padding, the cache and leaving the batch early change nothing (greedy: top_k 1)."""
    model = tiny_llama(seed=3)
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = WritingConfig(top_k=1, max_new_tokens=12)
    prompts = ["a", "a much longer prompt", "zz", "hello there"]
    together = writing.answer(model, prompts, config, torch.Generator())
    alone = [writing.answer(model, [p], config, torch.Generator())[0] for p in prompts]
    assert together == alone
    ids = torch.tensor([model.tokenizer.encode(prompts[1])])
    by_hand = []
    for _ in range(12):
        logits = model.run(ids)
        assert logits is not None
        nxt = logits[0, -1].argmax()
        if nxt == 0:
            break
        by_hand.append(int(nxt))
        ids = torch.cat([ids, nxt[None, None]], 1)
    assert model.tokenizer.decode(by_hand) == together[1]


def test_corpus_is_written_resumed_and_read_back(tmp_path, monkeypatch):
    model = tiny_llama(seed=1)
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = WritingConfig(tokens=300, batch=8, max_new_tokens=60, top_k=50)
    whole_run = write_corpus(tmp_path / "a", model, config, progress=False)
    assert verify(whole_run) == []
    stopped = []

    def stop(*arguments):
        if len(stopped) == 1:
            raise KeyboardInterrupt
        stopped.append(1)
        return answer(*arguments)

    answer = writing.answer
    monkeypatch.setattr(writing, "answer", stop)
    if len(list(read_documents(str(whole_run.path / "documents.parquet")))) > 8:
        with pytest.raises(KeyboardInterrupt):
            write_corpus(tmp_path / "b", model, config, progress=False)
    monkeypatch.setattr(writing, "answer", answer)
    resumed = write_corpus(tmp_path / "b", model, config, progress=False)
    texts = [
        [d.text for d in read_documents(str(run.path / "documents.parquet"))]
        for run in (whole_run, resumed)
    ]
    assert texts[0] == texts[1]
    assert not (resumed.path / "parts").exists()
    with pytest.raises(UserError, match="ask for more rounds"):
        short = WritingConfig(tokens=10**9, batch=1280, rounds=1, max_new_tokens=1)
        write_corpus(tmp_path / "c", model, short, progress=False)
