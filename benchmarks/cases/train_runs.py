"""Training as it is run: fine-tuning on texts of many lengths, packed and padded documents, pairs, and making tokens.

Ours is the Trainer or the data set that `fastattn train` makes; a peer is transformers' Trainer, a padded loop over its
model, or the tokenizers package alone.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from measure.protocols import CannotRun, Judgement, Step
from peers.encoders import SMALL as SMALL_ENCODER
from peers.gpt import GPTPair
from report import figures, schema

OURS, PADDED, GROUPED = "fastattn", "transformers-trainer", "transformers-trainer-grouped"
LOOP, ALONE = "transformers-padded", "tokenizers"


@dataclass(frozen=True)
class RunCase:
    """One of the uses: "tokens" makes rows of text, all others take whole steps with the optimiser."""

    name: str
    group: str
    count: int  # texts, documents, or repeats of the corpus
    batch: int
    shortest: int = 0
    longest: int = 0
    preset: str = ""
    target: schema.Result | None = None
    peers: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    axis: schema.Result | None = None
    flops: float | None = None
    bytes: float | None = None

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return figures.sizes(self, "count", "batch", "shortest", "longest", "preset")

    @property
    def label(self) -> str:
        """The case in words."""
        against = f", beside {self.target['against']}" if self.target else ""
        lengths = f"of {self.shortest} to {self.longest} tokens"
        if self.group == "fine-tune":
            return f"{self.preset or 'a small BERT'}, classification of {self.count} texts {lengths}{against}"
        if self.group == "pairs":
            model = f"{self.preset} twice with cross-attention" if self.preset else "a small encoder-decoder"
            return f"{model}, {self.batch} pairs {lengths}, with AdamW"
        if self.group in ("packed", "padded"):
            model = f"{self.preset} with {Packed.LAYERS} layers" if self.preset else "a small GPT"
            return f"{model}, {self.batch} documents {lengths}, {self.group}, with AdamW"
        return f"{self.count} times the packaged corpus to rows of 1024 tokens"

    @property
    def direction(self) -> str:
        """The passes that a step runs."""
        return "forward" if self.group == "tokens" else "forward+backward"

    def providers(self, device: torch.device) -> list[str]:
        """Ours first."""
        return [OURS, *self.peers]

    def open(self, device: torch.device) -> Any:
        """The inputs of all providers."""
        kinds: dict[str, Callable[..., Any]] = {"fine-tune": FineTuning, "pairs": Pairs, "tokens": Tokens}
        return kinds.get(self.group, Packed)(self, device)

    def small(self) -> RunCase:
        """The same of tiny models and few texts."""
        few = replace(self, preset="", count=min(self.count, 8), batch=min(self.batch, 4), target=None)
        if self.group == "tokens":
            return replace(few, count=1)
        return replace(few, shortest=4, longest=24)


class Unjudged:
    """Providers whose figures are not held against float64: each draws its own batches."""

    def judge(self, provider: str) -> Judgement | None:
        """None."""
        return None


class FineTuning(Unjudged):
    """A BERT classifier's steps over all texts once, in batches: ours in any order, a peer's also by length."""

    def __init__(self, case: RunCase, device: torch.device) -> None:
        from fastattn.models import BertConfig, BertForSequenceClassification

        self.case, self.device = case, device
        drawn = random.Random(7)
        sizes = {} if case.preset else SMALL_ENCODER
        config = BertConfig.preset(case.preset or "bert-base-uncased", **sizes, id2label={0: "no", 1: "yes"})
        lengths = [
            case.shortest + round((case.longest - case.shortest) * (i + 0.5) / case.count)
            for i in range(case.count)
        ]
        self.texts = [[drawn.randrange(5, config.vocab_size) for _ in range(length)] for length in lengths]
        self.labels = [drawn.randrange(2) for _ in lengths]
        torch.manual_seed(7)
        self.folder = tempfile.TemporaryDirectory()
        BertForSequenceClassification(config).save_pretrained(self.folder.name)

    def step(self, provider: str) -> Step:
        """A pass over all texts, with the updates."""
        return self._ours() if provider == OURS else self._theirs(by_length=provider == GROUPED)

    def _ours(self) -> Step:
        from fastattn.data.encoding import Row
        from fastattn.models import BertForSequenceClassification
        from fastattn.tasks.training import Encoded, layout_of
        from fastattn.train import TrainConfig, Trainer
        from fastattn.train.progress import NoDisplay

        model = BertForSequenceClassification.from_pretrained(self.folder.name).train()
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        rows = [Row(ids, [0] * len(ids), [], [], 0) for ids in self.texts]
        data = Encoded(rows, self.labels, **layout_of(model))
        config = TrainConfig(
            output_dir=f"{self.folder.name}/run",
            max_steps=10**6,
            batch_size=self.case.batch,
            lr=1e-5,
            device=str(self.device),
        )
        trainer = Trainer(model, config, data, collate=data.collate, display=NoDisplay())
        order = _shuffled(len(self.texts))

        def step() -> dict[str, Tensor]:
            losses = []
            for chosen in _batches(order, self.case.batch):
                losses.append(trainer.updates.take([trainer.batches.of(data, chosen)], 10, 0.0).loss)
            return {"loss": torch.tensor(losses)}

        return step

    def _theirs(self, *, by_length: bool) -> Step:
        import transformers

        try:
            arguments = transformers.TrainingArguments(
                output_dir=f"{self.folder.name}/peer",
                per_device_train_batch_size=self.case.batch,
                learning_rate=1e-5,
                max_steps=10**6,
                report_to="none",
                use_cpu=self.device.type == "cpu",
                remove_unused_columns=False,
            )
        except ImportError as error:  # accelerate, which its Trainer needs
            raise CannotRun(f"not installed: {str(error).splitlines()[0]}") from None
        model = transformers.BertForSequenceClassification.from_pretrained(
            self.folder.name, attn_implementation="sdpa"
        ).to(self.device)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=self.texts)
        trainer.create_optimizer_and_scheduler(10**6)
        trainer.current_gradient_accumulation_steps = 1  # which its own loop sets
        model.train()
        # what grouping by length comes to in a large set: batches of nearly one length
        order = sorted(range(len(self.texts)), key=lambda i: len(self.texts[i]))
        order = order if by_length else _shuffled(len(self.texts))

        def step() -> dict[str, Tensor]:
            losses = []
            for chosen in _batches(order, self.case.batch):
                batch = _padded([self.texts[i] for i in chosen], 0)
                batch["labels"] = torch.tensor([self.labels[i] for i in chosen])
                losses.append(trainer.training_step(model, batch))
                torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
                trainer.optimizer.step()
                trainer.lr_scheduler.step()
                model.zero_grad(set_to_none=True)
            return {"loss": torch.stack(losses)}

        return step


class Packed(Unjudged):
    """A GPT's step with AdamW on documents: "packed", ours in rows by best fit; "padded", ours as a peer's."""

    ROW = 1024
    LAYERS = 4  # of the preset's width, so that fifteen rounds take minutes
    keeps_state = True  # AdamW's, from the first step on

    def __init__(self, case: RunCase, device: torch.device) -> None:
        self.case, self.device = case, device
        rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
        layers = {"n_layer": self.LAYERS} if case.preset else {}
        self.pair = GPTPair(case.preset, device, **rates, **layers)
        self.row = self.ROW if case.preset else 64
        self.rows, self.documents = self._chosen()

    def _chosen(self) -> tuple[Any, list[list[int]]]:
        """Rows of a large packed set that hold as many documents as a batch, and these documents."""
        from fastattn.data.best_fit import packed_sequences

        case, drawn = self.case, random.Random(7)
        vocabulary = self.pair.config.vocab_size
        documents = [
            [drawn.randrange(vocabulary) for _ in range(drawn.randint(case.shortest, case.longest))]
            for _ in range(400)
        ]
        data = packed_sequences([(ids, [True] * len(ids)) for ids in documents], self.row)
        held = [[ids.tolist() for ids, _ in data.pieces_of(i)] for i in range(len(data))]
        order = drawn.sample(range(len(data)), len(data))
        for first, second in pairwise(order):
            if len(held[first]) + len(held[second]) == case.batch:
                return [data[first], data[second]], [*held[first], *held[second]]
        chosen = order[0]
        return [data[chosen]], held[chosen]

    def step(self, provider: str) -> Step:
        """One update on the documents."""
        model = self.pair.make("fastattn" if provider == OURS else "transformers-sdpa", torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=self.device.type == "cuda")
        if provider == OURS and self.case.group == "packed":
            batch = {name: torch.stack([row[name] for row in self.rows]) for name in self.rows[0]}
        else:
            batch = _padded(self.documents, 0)
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return _update(model, optimizer, {name: tensor.to(self.device) for name, tensor in batch.items()})


class Pairs(Unjudged):
    """An encoder-decoder's step with AdamW on pairs of texts, padded as collators do; the small form has no dropout."""

    VOCABULARY = 8192
    WITHOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    keeps_state = True

    def __init__(self, case: RunCase, device: torch.device) -> None:
        from fastattn.models import BertConfig, EncoderDecoder, EncoderDecoderConfig, bert_decoder

        self.case, self.device = case, device
        sizes = {"vocab_size": self.VOCABULARY} if case.preset else {**SMALL_ENCODER, **self.WITHOUT}
        config = BertConfig.preset(case.preset or "bert-base-uncased", **sizes, pad_token_id=0)
        tokens = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
        drawn = random.Random(7)
        lengths = [
            [drawn.randint(case.shortest, case.longest) for _ in range(case.batch)] for side in range(2)
        ]
        source, target = (
            _padded([[drawn.randrange(5, config.vocab_size) for _ in range(n)] for n in side], 0)
            for side in lengths
        )
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        self.batch = {name: tensor.to(device) for name, tensor in {**source, "labels": labels}.items()}
        torch.manual_seed(7)
        self.folder = tempfile.TemporaryDirectory()
        model = EncoderDecoder(EncoderDecoderConfig(config, bert_decoder(config), **tokens))
        model.save_pretrained(self.folder.name)

    def step(self, provider: str) -> Step:
        """One update on the pairs."""
        import transformers

        from fastattn.models import EncoderDecoder

        kind: Any = EncoderDecoder if provider == OURS else transformers.EncoderDecoderModel
        model = kind.from_pretrained(self.folder.name).to(self.device).train()
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        fused = self.device.type == "cuda"
        return _update(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused), self.batch)


class Tokens(Unjudged):
    """Text to packed rows, beside its encoding alone by the same tokenizer."""

    def __init__(self, case: RunCase, device: torch.device) -> None:
        from fastattn.data import default_corpus, train_bpe

        corpus = list(default_corpus())
        self.texts = corpus * case.count
        self.tokenizer = train_bpe(corpus, vocab_size=4096)

    def step(self, provider: str) -> Step:
        """All texts."""
        from fastattn.data import TokenStream
        from fastattn.data.best_fit import BestFitDataset

        def alone() -> dict[str, Tensor]:
            found = self.tokenizer.core.encode_batch_fast(self.texts, add_special_tokens=False)
            return {"rows": torch.tensor(len(found))}

        def packed() -> dict[str, Tensor]:
            stream = TokenStream.build(self.texts, self.tokenizer)
            return {"rows": torch.tensor(len(BestFitDataset.of_stream(stream, 1024)))}

        return packed if provider == OURS else alone


def _update(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Step:
    """A step with clipping on the same batch each time."""

    def step() -> dict[str, Tensor]:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach()}

    return step


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, S), as transformers' collators make them."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def _shuffled(count: int) -> list[int]:
    return random.Random(11).sample(range(count), count)


def _batches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def run_cases() -> list[RunCase]:
    """The cases of a CPU."""

    def at_least(against: str, speed: float) -> schema.Result:
        return {"provider": OURS, "against": against, "speed": speed}

    bert: dict[str, Any] = {
        "count": 32,
        "batch": 8,
        "shortest": 8,
        "longest": 128,
        "preset": "bert-base-uncased",
    }
    return [
        RunCase("fine-tune", "fine-tune", **bert, target=at_least(PADDED, 1.8), peers=(PADDED,)),
        RunCase("fine-tune-grouped", "fine-tune", **bert, target=at_least(GROUPED, 1.1), peers=(GROUPED,)),
        RunCase("packed", "packed", 8, 8, 50, 500, "gpt2", target=at_least(LOOP, 1.75), peers=(LOOP,)),
        RunCase("padded", "padded", 8, 8, 50, 500, "gpt2", peers=(LOOP,)),
        RunCase("pairs", "pairs", 32, 32, 8, 128, "minilm-l6", peers=(LOOP,)),
        RunCase("tokens", "tokens", 8, 0, target=at_least(ALONE, 0.8), peers=(ALONE,)),
    ]
