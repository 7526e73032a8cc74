"""From text to training batches: corpora, tokenisers and packed blocks of tokens."""

from fastattn.data.best_fit import BestFitDataset
from fastattn.data.corpora import DataError, TextFiles, default_corpus
from fastattn.data.packing import PackedDataset, TokenStream, split
from fastattn.data.tokenization import Tokenizer, train_bpe, train_characters

__all__ = [
    "BestFitDataset",
    "DataError",
    "PackedDataset",
    "TextFiles",
    "TokenStream",
    "Tokenizer",
    "default_corpus",
    "split",
    "train_bpe",
    "train_characters",
]
