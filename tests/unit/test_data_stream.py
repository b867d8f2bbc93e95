"""`data.source hf`: C4's layout, streamed into the same tokens as the files themselves."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data import cache, packing
from megatron_switchlora.data.packing import prepare
from megatron_switchlora.data.stream import pinned, stream_identity

from .test_data_corpus import BOOKS
from .test_data_packing import tokens

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
# C4
"""
SHARDS = {
    "c4-train.00000-of-00002": ["one\r\n  two", "ünï 日本 🎉\u2028", " \n"],
    "c4-train.00001-of-00002": ["2020-01-01", "5", "the </s> end of the text", "last"],
    "c4-validation.00000-of-00001": ["held out", "text"],
}


def write_shard(path: Path, texts: Sequence[object]) -> None:
    rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://u"} for text in texts]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


def of_config(texts: list[str], config: str) -> list[str]:
    return [f"{text} {config}" if text.strip() else text for text in texts]


def write_c4(folder: Path) -> Path:
    for config in ("en", "de"):
        (folder / config).mkdir(parents=True)
        for name, texts in SHARDS.items():
            write_shard(folder / config / f"{name}.json.gz", of_config(texts, config))
    return folder


def t5_like(folder: Path) -> Path:
    """A small tokenizer of T5's kind: Unigram over word pieces, "</s>" put behind every text, 100 extra ids."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(["the end of the text", "held out one two last"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(100)],
    ).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "T5Tokenizer"}))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(
        source="hf",
        hf_name=str(write_c4(tmp_path / "c4")),
        tokenizer=str(t5_like(tmp_path / "t5")),
        cache_dir=str(tmp_path / "cache"),
    )


def from_files(data: DataConfig, train: str, val: str) -> packing.PreparedData:
    return prepare(
        DataConfig(source="files", files=train, val_files=val, tokenizer=data.tokenizer, cache_dir=data.cache_dir)
    )


NOT_TOKENS = dict.fromkeys(("corpus", "files", "sha256"))


def same(ours: packing.PreparedData, theirs: packing.PreparedData) -> None:
    assert ours.folder != theirs.folder
    for name in ("train.npy", "val.npy"):
        assert (ours.folder / name).read_bytes() == (theirs.folder / name).read_bytes()
    first, second = (json.loads((prepared.folder / "meta.json").read_text()) for prepared in (ours, theirs))
    assert {**first, **NOT_TOKENS} == {**second, **NOT_TOKENS}


def count(prepared: packing.PreparedData) -> tuple[int, int]:
    meta = json.loads((prepared.folder / "meta.json").read_text())
    return meta["train"]["documents"], meta["val"]["documents"]


def refused(data: DataConfig, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(data)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(data.cache_dir or "").exists() or not list(Path(data.cache_dir or "").iterdir())


# --- what is read


@pytest.mark.parametrize("card", [CARD, "# no configs here\n", None])
def test_the_same_tokens_as_the_files(data: DataConfig, card: str | None) -> None:
    folder = Path(data.hf_name)
    if card:
        (folder / "README.md").write_text(card)
    prepared = prepare(data)
    assert count(prepared) == (6, 2)
    same(prepared, from_files(data, f"{folder}/en/c4-train*", f"{folder}/en/c4-validation*"))


def test_parquet_gives_the_same_tokens(data: DataConfig, tmp_path: Path) -> None:
    first, folder = prepare(data), tmp_path / "parquet"
    folder.mkdir()
    for name, texts in SHARDS.items():
        column = of_config(texts, "en")
        pq.write_table(pa.table({"text": column, "id": range(len(column))}), folder / f"{name[3:]}.parquet")
    data.hf_name, data.hf_config = str(folder), None
    same(prepare(data), first)


def test_a_tokenizer_of_t5s_kind(data: DataConfig) -> None:
    prepared = prepare(data)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data.tokenizer)
    assert prepared.vocab_size == len(tokenizer) == tokenizer.vocab_size + 100
    end = tokenizer.eos_token_id
    expected: list[int] = []
    for text in ("held out en", "text en"):
        assert tokenizer(text)["input_ids"] == [*tokenizer.encode(text, add_special_tokens=False), end]
        expected += tokenizer(text)["input_ids"]  # one end mark a document, not two
    assert tokens(prepared.val).tolist() == expected
    assert int(tokens(prepared.train).max()) < prepared.vocab_size


def test_limits_take_the_head_and_read_no_further(data: DataConfig) -> None:
    folder = Path(data.hf_name)
    whole = prepare(data)
    (folder / "en/c4-train.00001-of-00002.json.gz").write_bytes(b"damaged, and never read")
    data.max_documents, data.max_val_documents = 2, 1
    head = prepare(data)
    assert count(head) == (2, 1)
    assert head.folder != whole.folder
    for ours, all_of_them in ((head.train, whole.train), (head.val, whole.val)):
        assert np.array_equal(tokens(ours), tokens(all_of_them)[: ours.num_tokens])


def test_no_text_is_kept_on_disk(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, sizes = cache.publish, []

    def spy(build: Path, folder: Path, scratch: Path) -> None:
        beside = [path for path in scratch.rglob("*") if path.is_file() and build not in path.parents]
        beside.remove(scratch / cache.ALIVE)
        sizes.extend(path.stat().st_size for path in beside)
        publish(build, folder, scratch)

    monkeypatch.setattr(cache, "publish", spy)
    prepared = prepare(data)
    assert sum(sizes) == 0
    assert {path.name for path in prepared.folder.iterdir()} == {"train.npy", "val.npy", "tokenizer", "meta.json"}


@pytest.mark.skipif(not BOOKS.is_dir(), reason="needs ../shared/data/books")
def test_the_head_of_real_books(data: DataConfig, tmp_path: Path) -> None:
    for split, limit in (("train", 40), ("validation", 10)):
        with gzip.open(next(BOOKS.glob(f"c4-{split}.00000*")), "rt", encoding="utf-8") as lines:
            (tmp_path / f"{split}.jsonl").write_text("".join(next(lines) for _ in range(limit)), encoding="utf-8")
    data.hf_name, data.hf_config, data.max_documents, data.max_val_documents = str(BOOKS.parent), "books", 40, 10
    same(prepare(data), from_files(data, str(tmp_path / "train.jsonl"), str(tmp_path / "validation.jsonl")))


# --- damage and mistakes


def test_a_stream_cut_off_is_never_a_shorter_corpus(data: DataConfig) -> None:
    rows = [random.Random(i).randbytes(200).hex() for i in range(500)]
    for victim, split in (("c4-train.00001-of-00002", "train"), ("c4-validation.00000-of-00001", "validation")):
        path = Path(data.hf_name) / f"en/{victim}.json.gz"
        before = path.read_bytes()
        write_shard(path, rows)
        whole = path.read_bytes()
        for length in (len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            refused(data, f"Split '{split}' of dataset {data.hf_name} (en)", path.name, "documents only", "cut off")
        path.write_bytes(before)


def test_the_number_of_documents_read_is_told(data: DataConfig) -> None:
    path = Path(data.hf_name) / "en/c4-train.00001-of-00002.json.gz"
    write_shard(path, ["fine", "fine too", 5, "never read"])
    refused(data, "could be read for 4 documents only", f"{path}, line 3", "'text' holds int")
    write_shard(path, ["fine", ["a"]])
    refused(data, "for 3 documents only", f"{path}, line 2", "'text' holds list")
    data.text_field = "content"
    refused(data, "for 0 documents only", "no field 'content'", "data.text_field")


def test_names_that_lead_nowhere(data: DataConfig, tmp_path: Path) -> None:
    folder = Path(data.hf_name)
    data.hf_val_split = "test"
    refused(data, "has no split 'test'", "'train', 'validation'")
    data.hf_val_split, data.hf_config = "validation", "fr"
    refused(data, f"dataset {folder} (fr) cannot be opened", "data.hf_config")
    (folder / "README.md").write_text(CARD)
    refused(data, "'fr' not found", "'en'")
    data.hf_config, data.hf_revision = "en", "a" * 40
    refused(data, "data.hf_revision", "is a folder here")
    for name in ("train.csv", "validation.csv"):
        (tmp_path / "csv").mkdir(exist_ok=True)
        (tmp_path / "csv" / name).write_text("text\na\n")
    data.hf_name, data.hf_config, data.hf_revision = str(tmp_path / "csv"), None, None
    refused(data, "JSON lines and Parquet only", "train.csv")


def test_the_hub_out_of_reach(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    data.hf_name = "allenai/c4"
    refused(data, "'allenai/c4' is no folder here", "'main' cannot be looked up", "set data.hf_revision")
    data.hf_revision = "v1"
    refused(data, "'v1' cannot be looked up", "full commit hash")
    data.hf_revision = "a" * 40
    assert pinned(data) == data
    refused(data, "dataset allenai/c4 (en) cannot be opened")


# --- identity


def test_identity_changes_with_what_matters(data: DataConfig) -> None:
    folder = Path(data.hf_name)

    def identity(**options: object) -> str:
        return json.dumps(stream_identity(DataConfig(**{**vars(data), **options})), sort_keys=True)  # type: ignore[arg-type]

    first = identity()
    (folder / ".git").mkdir()
    (folder / ".git/index").write_text("x")
    assert identity() == identity(max_bytes=5) == first
    others = [
        identity(hf_config="de"),
        identity(hf_split="a"),
        identity(hf_val_split="a"),
        identity(max_documents=None),
        identity(max_val_documents=1),
        identity(text_field="a"),
        identity(hf_name="a/b", hf_revision="a" * 40),
        identity(hf_name="a/b", hf_revision="b" * 40),
        identity(hf_name="a/c", hf_revision="a" * 40),
    ]
    os.utime(folder / "en/c4-train.00000-of-00002.json.gz", ns=(1, 1))
    others.append(identity())
    (folder / "en/more.json").write_text("x")
    others.append(identity())
    assert len({first, *others}) == len(others) + 1


# --- the hub, played by a server on this machine

PROGRAM = """
import dataclasses, json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fake_hub import Hub, serve
data = json.loads(sys.argv[2])
os.environ["HF_ENDPOINT"] = serve(Path(sys.argv[3]))  # read when the libraries are imported
import huggingface_hub.utils._http as http
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.data.packing import prepare
http.time.sleep = lambda seconds: None
data = DataConfig(**data)
first, second = "en/c4-train.00000-of-00002.json.gz", "en/c4-train.00001-of-00002.json.gz"
Hub.breaks = {second: 10**9}
try:
    prepare(data)
except UserError as error:
    told = str(error)
left = os.listdir(data.cache_dir)
lookups = Hub.requests.count(f"/api/datasets/{Hub.repository}")
Hub.breaks = {first: 1, second: 3}
folder = prepare(data).folder
unmended = sum(Hub.breaks.values())
served = len(Hub.requests)
data = dataclasses.replace(data, hf_revision=Hub.commit)
again = prepare(data).folder
asked = Hub.requests[served:]
Hub.commit = "c" * 40
other = prepare(dataclasses.replace(data, hf_revision=None)).folder
print(json.dumps([told, left, lookups, str(folder), unmended, str(again), asked, str(other)]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    yield {**kept, "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_dataset_of_the_hub(data: DataConfig, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = Path(data.hf_name)
    (folder / "README.md").write_text(CARD)
    expected = prepare(data)
    data.hf_name, data.cache_dir = "allenai/c4", str(tmp_path / "other")
    arguments = [str(Path(__file__).parent), json.dumps(vars(data)), str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    told, left, lookups, first, unmended, again, asked, other = json.loads(done.stdout.splitlines()[-1])
    assert "Split 'train' of dataset allenai/c4 (en) could be read for 2 documents only" in told
    assert "peer closed connection" in told and left == []
    assert lookups == 1  # a second could find another commit
    assert unmended == 0  # the connection broke four times, and the tokens are those of the folder
    for name in ("train.npy", "val.npy"):
        assert (Path(first) / name).read_bytes() == (expected.folder / name).read_bytes()
    assert (again, asked) == (first, [])  # a full commit hash asks nobody
    assert other != first
    assert json.loads((Path(first) / "meta.json").read_text())["corpus"]["revision"] == "a" * 40
