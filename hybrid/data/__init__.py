"""Corpora, tokenizers and batches. numpy only: nothing here imports torch."""

from hybrid.data.corpus import IGNORE, Corpus, prepare, train_characters
from hybrid.data.files import DataError
from hybrid.data.vocabulary import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "IGNORE",
    "BPETokenizer",
    "CharTokenizer",
    "Corpus",
    "DataError",
    "Tokenizer",
    "load_tokenizer",
    "prepare",
    "train_characters",
]
