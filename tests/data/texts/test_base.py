"""What all texts share: subwords, truncation, batches, the tokenizer in checkpoints."""

import logging
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from sinkformer_pl.data.source import Source
from sinkformer_pl.data.texts.base import TextData, Texts, read_lines
from sinkformer_pl.data.texts.tokenizer import encode, load_tokenizer, train_tokenizer
from sinkformer_pl.errors import UserError

WORDS = ["the", "a", "film", "was", "good", "bad", "and", "very", "not", "plot", "actors", "story", "boring", "great"]


def corpus(start: int, size: int, extra: str = "") -> Texts:
    """Texts of 1 to 40 words, all different."""
    texts = [
        " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(number % 40 + 1))
        + f" {number}{extra}"
        for number in range(start, start + size)
    ]
    return Texts(texts, torch.arange(size) % 2, [f"text {number}" for number in range(start, start + size)])


class Corpus(TextData):
    def __init__(self, *, train: Texts | None = None, test: Texts | None = None, **kwargs: Any) -> None:
        super().__init__(["a", "b"], **{"vocab_size": 400, "max_length": 24} | kwargs)
        self.source = Source(corpus(0, 200) if train is None else train, corpus(200, 20) if test is None else test)

    def load(self) -> Source:
        return self.source


class OtherCorpus(Corpus):
    pass


def ready(cls: type[Corpus] = Corpus, **kwargs: Any) -> Corpus:
    data = cls(**kwargs)
    data.setup()
    return data


def inputs(data: TextData, split: str = "test") -> list[list[int]]:
    dataset = data.datasets[split]
    return [dataset[index].inputs.tolist() for index in range(len(dataset))]


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(400, 2, padding_idx=0)

    def training_step(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.embedding(batch.inputs).mean(1), batch.target)

    def predict_step(self, batch: Any) -> list[list[int]]:
        return [[token for token in row if token] for row in batch.inputs.tolist()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, max_epochs=1, **quiet | kwargs)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_every_text_has_tokens_that_give_it_back_and_none_is_padding(text):
    tokenizer = train_tokenizer(corpus(0, 50).texts, vocab_size=300, lowercase=False)
    encoded = encode(tokenizer, [text], max_length=1000)
    assert encoded.tokens.min() > 0
    assert encoded.tokens.max() < 300
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.decode(encoded.tokens.tolist()).removeprefix(" ") == text.removeprefix(" ")


def test_the_name_of_padding_in_a_text_is_text():
    tokenizer = train_tokenizer(corpus(0, 50).texts, vocab_size=300, lowercase=False)
    again = load_tokenizer(tokenizer.to_str())
    for each in (tokenizer, again):
        assert (encode(each, ["a [PAD] b [PAD]"], max_length=100).tokens > 0).all()


def test_case_is_dropped_on_demand():
    data = ready(test=Texts(["GOOD Film", "good film"], torch.tensor([0, 1]), ["x", "y"]), lowercase=True)
    assert inputs(data)[0] == inputs(data)[1]
    data = ready(test=Texts(["GOOD Film", "good film"], torch.tensor([0, 1]), ["x", "y"]))
    assert inputs(data)[0] != inputs(data)[1]


def test_the_tokenizer_is_learnt_from_the_training_split_alone_and_repeatable():
    one = ready()
    two = ready(test=corpus(500, 30, " unheard unheard unheard"))
    assert one.tokenizer.to_str() == two.tokenizer.to_str()
    val = set(one.datasets["val"].texts)
    training = corpus(0, 200)
    assert len(val) == 20
    changed = [text + " qqqq" * (text in val) for text in training.texts]
    three = ready(train=training._replace(texts=changed))
    assert three.datasets["val"].names == one.datasets["val"].names
    assert three.tokenizer.to_str() == one.tokenizer.to_str()
    assert one.tokenizer.get_vocab_size() <= 400


def test_the_head_of_a_text_is_kept_and_what_was_cut_is_counted_once(caplog):
    cut = ready(max_length=5)
    with caplog.at_level(logging.INFO):
        tokens = inputs(cut)
        cut.load_state_dict(cut.state_dict())  # as Lightning does for a checkpoint
        list(cut.test_dataloader())
    expected = [cut.tokenizer.encode(text).ids for text in cut.datasets["test"].texts]
    assert tokens == [ids[:5] for ids in expected]
    count = sum(len(ids) > 5 for ids in expected)
    assert 0 < count < 20
    messages = [record.getMessage() for record in caplog.records if "were cut" in record.getMessage()]
    assert messages == [f"{count} of 20 test texts were cut at 5 tokens (data.max_length)"]


@pytest.mark.parametrize("line", ["word " * 2_000_000, "a" * 10_000_000])
def test_a_text_of_ten_megabytes_costs_no_more_than_its_head(line):
    train = corpus(0, 20)
    began = time.process_time()
    data = ready(train=train._replace(texts=[line, *train.texts[1:]]), test=Texts([line], torch.tensor([0]), ["x"]))
    assert len(inputs(data)[0]) <= 24
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text_is_named(text):
    train = corpus(0, 20)
    with pytest.raises(UserError, match="Corpus: text 3 is an empty text; fill or remove it"):
        ready(train=train._replace(texts=[*train.texts[:3], text, *train.texts[4:]]))


def test_half_a_character_is_named():
    train = corpus(0, 20)
    with pytest.raises(UserError, match="text 0 has half of a surrogate pair at character 2"):
        ready(train=train._replace(texts=["ab\ud800", *train.texts[1:]]))


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("good\nna\u00efve\n".encode() + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"x.txt: not UTF-8 at byte 15, line 3 \(0xe9\)"):
        read_lines(path)


def test_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffone\u2028still one\r\ntwo\x0b\x85two\n\nfour".encode())
    assert read_lines(path) == ["one\u2028still one", "two\x0b\x85two", "", "four"]


def test_texts_in_two_splits_are_counted_and_equal_training_texts_stay_together():
    train = corpus(0, 60)
    doubled = Texts([*train.texts] * 2, torch.cat([train.targets] * 2), [*train.names] * 2)
    with pytest.warns(UserWarning, match="3 of 5 test texts are also among the training texts"):
        data = ready(
            train=doubled,
            test=Texts([*corpus(90, 2).texts, *_training(doubled)[:3]], torch.arange(5) % 2, list("abcde")),
        )
    assert not set(data.datasets["train"].texts) & set(data.datasets["val"].texts)
    assert len(data.datasets["val"]) == 12


def _training(texts: Texts) -> list[str]:
    return list(dict.fromkeys(ready(train=texts, test=corpus(900, 4)).datasets["train"].texts))


@pytest.mark.parametrize(("key", "value"), [("max_length", 0), ("vocab_size", 256), ("vocab_size", 10**12)])
def test_arguments_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"data.{key} is {value}"):
        Corpus(**{key: value})


# Batches


def padding(data: TextData) -> float:
    batches = list(data.train_dataloader())
    tokens = sum(batch.inputs.numel() for batch in batches)
    return sum(0 if batch.mask is None else int((~batch.mask).sum()) for batch in batches) / tokens


def test_batches_hold_padded_tokens_of_similar_length():
    sources = {"train": corpus(0, 700), "test": corpus(900, 20)}
    data = ready(**sources, batch_size=8, max_length=200)
    tokens = inputs(data, "train")
    seen = []
    for batch in data.train_dataloader():
        assert batch.inputs.dtype == torch.int64
        mask = torch.ones_like(batch.inputs, dtype=torch.bool) if batch.mask is None else batch.mask
        assert torch.equal(batch.inputs != 0, mask)
        assert mask.any(dim=0).all()
        for row, index in zip(batch.inputs, batch.index.tolist(), strict=True):
            assert row[row != 0].tolist() == tokens[index]
            seen.append(index)
    assert sorted(seen) == list(range(630))
    assert padding(data) < 0.1 < 0.3 < padding(ready(**sources, batch_size=8, max_length=200, similar_lengths=False))
    assert [index for batch in data.test_dataloader() for index in batch.index.tolist()] == list(range(20))


@pytest.mark.filterwarnings("ignore:.*workers")
def test_batches_do_not_depend_on_workers_and_processes_get_no_texts(caplog):
    alone, helped = ready(), ready(num_workers=2)
    for one, two in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert torch.equal(one.inputs, two.inputs)
        assert torch.equal(one.index, two.index)
    caplog.set_level(logging.INFO)
    list(ready(num_workers=2, max_length=5, similar_lengths=False).test_dataloader())
    assert "test texts were cut" in caplog.text  # here, once, rather than in each process
    dataset = ready().datasets["train"]
    content = pickle.dumps(dataset)
    assert dataset.texts[0].encode() not in content
    assert torch.equal(pickle.loads(content)[3].inputs, dataset[3].inputs)


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run = trainer(tmp_path, enable_checkpointing=False)
    data = Corpus()
    run.fit(Model(), datamodule=data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


@pytest.mark.filterwarnings("ignore:.*workers", "ignore:.*were provided")
@pytest.mark.parametrize("before", [True, False], ids=["read before", "read by the trainer"])
def test_a_checkpoint_encodes_with_its_own_tokenizer(tmp_path, checkpoint, before):
    expected = inputs(ready())
    other = Corpus(train=corpus(1000, 100, " something else entirely"))
    if before:
        other.setup()
        assert inputs(other) != expected
    predicted = trainer(tmp_path).predict(Model(), datamodule=other, ckpt_path=checkpoint, weights_only=True)
    assert [row for batch in predicted for row in batch] == expected


def test_other_data_take_the_tokenizer_of_a_checkpoint(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    data = OtherCorpus(train=corpus(1000, 100, " something else entirely"))
    data.restore(content)
    data.setup()
    assert inputs(data) == inputs(ready())
    del content["Corpus"]
    with pytest.raises(UserError, match="the checkpoint has no tokenizer"):
        data.restore(content)


def test_arguments_that_a_checkpoint_overrules_are_named(checkpoint):
    data = Corpus(vocab_size=300, lowercase=True)
    with pytest.warns(UserWarning, match="but the checkpoint's tokenizer") as caught:
        data.restore(torch.load(checkpoint, weights_only=True))
    assert [str(warning.message)[:35] for warning in caught] == [
        "data.vocab_size is 300, but the che",
        "data.lowercase is True, but the che",
    ]
    assert (data.vocab_size, data.lowercase) == (400, False)


@pytest.mark.parametrize("saved", ["{}", "no JSON"])
def test_a_damaged_tokenizer_is_refused(saved):
    with pytest.raises(UserError, match="the saved tokenizer"):
        Corpus().load_state_dict({"tokenizer": saved})
