"""Encoders on batches of unequal lengths and on sentences, beside transformers and sentence-transformers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cases.decoders import TRANSFORMERS, DecoderCase
from inputs.products import PRODUCTS, Product, matrices, products_step
from inputs.varlen import spread_lengths
from measure.harness import Budget
from measure.protocols import CannotRun, Judgement, Step, Tensors
from peers.encoders import EncoderPair, embedding_folder, in_groups, padded_sentences, sentences
from report import figures, schema

BUDGET = Budget(seconds=60.0, least_rounds=15, memory=False)
PADDED, SORTED, SENTENCES = "transformers-padded", "transformers-sorted-8", "sentence-transformers"
INT8 = "fastattn-int8"
LEAST_COSINE = 0.995  # mean cosine between vectors from 8-bit weights and from float32 weights


@dataclass(frozen=True)
class EncoderCase:
    """A forward pass over `batch` sequences of `shortest` to `longest` tokens, or one of training with its backward."""

    name: str
    group: str  # "encoder", or "encoder-training": a masked language model, a seventh of the tokens masked
    preset: str
    layers: int
    batch: int = 32
    shortest: int = 8
    longest: int = 128
    dtype: torch.dtype = torch.float32
    target: schema.Result | None = None
    peers: tuple[str, ...] = (PADDED, SORTED)

    bytes = None  # arithmetic bounds the call

    @property
    def direction(self) -> str:
        """The passes that are timed."""
        return "forward+backward" if self.group == "encoder-training" else "forward"

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return figures.sizes(self, "preset", "layers", "batch", "shortest", "longest")

    @property
    def label(self) -> str:
        """The case in words."""
        sizes = f"{self.batch} sequences of {self.shortest} to {self.longest} tokens"
        head = "a training pass of a masked language model on" if self.group == "encoder-training" else ""
        beside = f", beside {self.peers[0]}" if len(self.peers) == 1 else ""
        words = f"{self.preset} with {self.layers} layers, {head} {sizes}{beside}".replace(",  ", ", ")
        return ", ".join([words, *figures.unusual(self.dtype, self.direction)])

    @property
    def axis(self) -> schema.Result | None:
        """None: the cases differ in more than a size."""
        return None

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sequence, (batch,)."""
        return spread_lengths(self.shortest, self.longest, self.batch, seed=1)

    @property
    def flops(self) -> float | None:
        """Of the layers' products and of attention, on real tokens without padding; backward, twice as much again."""
        if not self.preset:
            return None
        from fastattn.models import Bert, BertConfig

        with torch.device("meta"):
            trunk = Bert(BertConfig.preset(self.preset, num_hidden_layers=self.layers))
        weights = sum(weight.numel() for weight in matrices(trunk.layers))
        pairs = float((self.lengths**2).sum())
        forward = (
            2.0 * weights * int(self.lengths.sum()) + 4.0 * self.layers * trunk.config.hidden_size * pairs
        )
        return forward * (3.0 if self.direction != "forward" else 1.0)

    def providers(self, device: torch.device) -> list[str]:
        """Ours first; the floor last."""
        return ["fastattn", *self.peers, PRODUCTS]

    def open(self, device: torch.device) -> EncoderWorkload:
        """Random weights and random ids on the device."""
        return EncoderWorkload(self, device)

    def small(self) -> EncoderCase:
        """The same use of a tiny model."""
        return replace(self, preset="", layers=2, batch=9, longest=24, target=None)


class EncoderWorkload:
    """One set of weights in both libraries' models, and the padded batch."""

    def __init__(self, case: EncoderCase, device: torch.device) -> None:
        self.case = case
        self.training = case.group == "encoder-training"
        self.pair = EncoderPair(case.preset, case.layers, device, training=self.training)
        lengths = case.lengths
        self.mask = (torch.arange(case.longest) < lengths[:, None]).long().to(device)
        generator = torch.Generator().manual_seed(2)
        size = (case.batch, case.longest)
        self.ids = torch.randint(1, self.pair.config.vocab_size, size, generator=generator).to(device)
        self.ids *= self.mask
        hidden = (torch.rand(size, generator=generator).to(device) > 1 / 7) | (self.mask == 0)
        self.labels = self.ids.masked_fill(hidden, -100)

    def step(self, provider: str) -> Step:
        """One pass over the batch; its hidden states at real tokens, or its loss."""
        if provider == PRODUCTS:
            tokens = int(self.mask.sum())
            layers = self.pair.model.bert.layers.to(self.case.dtype)
            products = [Product(weight, tokens) for weight in matrices(layers)]
            return products_step(products, training=self.training)
        model = self.pair.make(provider.partition("-")[0], self.case.dtype)
        if self.training:

            def train() -> Tensors:
                model.zero_grad()
                loss = model(self.ids, attention_mask=self.mask, labels=self.labels).loss
                loss.backward()
                return {"loss": loss.detach()}

            return train
        groups = in_groups(self.mask) if provider == SORTED else None
        real = self.mask.bool()

        def forward() -> Tensors:
            with torch.no_grad():
                if groups is None:
                    return {"out": model(self.ids, attention_mask=self.mask).last_hidden_state[real]}
                states = self.ids.new_zeros(
                    (*self.ids.shape, self.pair.config.hidden_size), dtype=self.case.dtype
                )
                for rows, longest in groups:
                    part = model(self.ids[rows, :longest], attention_mask=self.mask[rows, :longest])
                    states[rows, :longest] = part.last_hidden_state
                return {"out": states[real]}

        return forward

    def judge(self, provider: str) -> Judgement | None:
        """None: float64 of a whole model takes longer than the case; tests compare the small forms."""
        return None


@dataclass(frozen=True)
class SentenceCase:
    """`count` English sentences to vectors, tokenisation included."""

    name: str
    preset: str
    count: int
    group: str = "embedding"
    dtype: torch.dtype = torch.float32
    target: schema.Result | None = None
    peers: tuple[str, ...] = (SENTENCES,)
    ours: str = "fastattn"

    direction = "forward"
    flops = bytes = axis = None

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return {"preset": self.preset, "count": self.count}

    @property
    def label(self) -> str:
        """The case in words."""
        words = f"{self.preset}, {self.count} sentences, tokenisation included"
        words += ", 8-bit weights" if self.ours == INT8 else ""
        return ", ".join([words, *figures.unusual(self.dtype, "forward")])

    def providers(self, device: torch.device) -> list[str]:
        """Ours first; the floor last."""
        return [self.ours, *self.peers, PRODUCTS]

    def open(self, device: torch.device) -> SentenceWorkload:
        """A folder that both read, and the sentences."""
        return SentenceWorkload(self, device)

    def small(self) -> SentenceCase:
        """The same use of a tiny model."""
        return replace(self, preset="", count=20, target=None)


class SentenceWorkload:
    """The sentences and a folder."""

    def __init__(self, case: SentenceCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.scratch = tempfile.TemporaryDirectory()
        self.texts = sentences(case.count)
        self.folder = embedding_folder(case.preset, Path(self.scratch.name), self.texts)

    def step(self, provider: str) -> Step:
        """One call of encode."""
        if provider == SENTENCES:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise CannotRun(f"sentence-transformers: {error}") from None
            theirs = SentenceTransformer(str(self.folder), device=self.device.type)
            return lambda: {
                "out": theirs.encode(self.texts, convert_to_tensor=True, show_progress_bar=False).cpu()
            }
        if provider == PADDED:
            return padded_sentences(self.folder, self.texts, self.device)
        from fastattn.models import BertForEmbedding

        ours = BertForEmbedding.from_pretrained(self.folder).to(self.device, self.case.dtype)
        if provider == PRODUCTS:
            tokens = sum(len(text.ids) for text in ours.tokenizer.encode_batch(self.texts))
            products = [Product(weight, tokens) for weight in matrices(ours.bert.layers)]
            return products_step(products, "int8" if self.case.ours == INT8 else None)
        if provider == INT8:
            plain = ours.encode(self.texts).cpu()
            ours.quantize("int8")
            cosine = torch.cosine_similarity(plain, ours.encode(self.texts).cpu()).mean().item()
            if cosine < LEAST_COSINE:
                raise ValueError(f"a mean cosine of {cosine:.5f} to float32, needs {LEAST_COSINE}")
        return lambda: {"out": ours.encode(self.texts).cpu()}

    def judge(self, provider: str) -> Judgement | None:
        """None: see EncoderWorkload."""
        return None


def cases_for(device: torch.device) -> list[EncoderCase | SentenceCase | DecoderCase]:
    """Every case of a device, the most important first."""

    def faster(speed: float, against: str, provider: str = "fastattn") -> schema.Result:
        return figures.target(speed, against, provider)

    if device.type == "cpu":
        return [
            EncoderCase(
                "bert-base-32x8-128-padded", "encoder", "bert-base-uncased", 12,
                target=faster(2.0, PADDED), peers=(PADDED,),
            ),
            EncoderCase(
                "bert-base-32x8-128-sorted", "encoder", "bert-base-uncased", 12,
                target=faster(1.15, SORTED), peers=(SORTED,),
            ),
            EncoderCase(
                "bert-base-2-layers-training", "encoder-training", "bert-base-uncased", 2, peers=(PADDED,),
            ),
            SentenceCase("minilm-1000-sentences", "minilm-l6", 1000, target=faster(1.1, SENTENCES)),
            SentenceCase(
                "minilm-1000-sentences-int8", "minilm-l6", 1000, ours=INT8, peers=(PADDED,),
                target=faster(3.5, PADDED, INT8),
            ),
            DecoderCase(
                "llama-decode-ragged", "smollm-135m", {"vocab_size": 32000},
                target=faster(1.5, TRANSFORMERS),
            ),
        ]  # fmt: skip
    return [
        EncoderCase("bert-base-64x16-512", "encoder", "bert-base-uncased", 12, 64, 16, 512, torch.bfloat16),
        SentenceCase("minilm-1000-sentences", "minilm-l6", 1000),
        DecoderCase("llama-decode-ragged-bf16", "smollm-135m", longest=512, dtype=torch.bfloat16),
    ]
