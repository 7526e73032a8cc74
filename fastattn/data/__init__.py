"""From text to training batches: corpora, tokenisers and packed blocks of tokens."""

from fastattn.data.corpora import DataError, TextFiles, default_corpus
from fastattn.data.packing import PackedDataset, TokenStream, split
from fastattn.data.tokenization import Tokenizer, train_bpe

__all__ = [
    "DataError",
    "PackedDataset",
    "TextFiles",
    "TokenStream",
    "Tokenizer",
    "default_corpus",
    "split",
    "train_bpe",
]
