"""Prepare corpora, tokenizers and packed tokens, and define the order of samples.

`prepare` turns a `DataConfig` into token arrays on disk (corpus -> tokenizer -> packing). `BatchOrder` and
`TrainLoader` define which samples a rank sees at each step.
"""

from megatron_switchlora.data.corpus import Corpus, corpus_identity, load_corpus
from megatron_switchlora.data.loader import BatchOrder, Reader, Samples, TokenStore, TrainLoader, eval_batches
from megatron_switchlora.data.packing import PreparedData, open_prepared, prepare
from megatron_switchlora.data.tokenizer import build_tokenizer

__all__ = [
    "BatchOrder",
    "Corpus",
    "PreparedData",
    "Reader",
    "Samples",
    "TokenStore",
    "TrainLoader",
    "build_tokenizer",
    "corpus_identity",
    "eval_batches",
    "load_corpus",
    "open_prepared",
    "prepare",
]
