"""EncoderDecoder: an encoder reads a source, a decoder with cross-attention writes a target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastattn.constants import IGNORE_INDEX
from fastattn.generation import generate
from fastattn.models.checkpoint import (
    ENCODER_DECODERS,
    Family,
    LoadReport,
    Pretrained,
    load_weights,
    open_weights,
    read_json,
    resolve_folder,
)
from fastattn.models.checkpoint.encoder_decoder import NEW_IN_DECODER, decoder_family, read_decoder
from fastattn.models.checkpoint.load import float_dtype
from fastattn.models.checks import check_range
from fastattn.models.continuation import Continuation
from fastattn.models.decoder import GPT
from fastattn.models.decoder_inputs import count_positions
from fastattn.models.encoded import Encoded
from fastattn.models.encoder import Bert
from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.models.losses import check_targets
from fastattn.nn.cross_attention import Memory
from fastattn.nn.linear import Linear
from fastattn.nn.modes import evaluating
from fastattn.nn.uninitialised import Uninitialised
from fastattn.nn.unpadding import Tokens
from fastattn.ops.arguments import INTEGER_DTYPES, check_tensor

Model = TypeVar("Model", bound="EncoderDecoder")


class Seq2SeqOutput(NamedTuple):
    """The output of an encoder-decoder. Names are transformers'.

    Attributes:
        loss: () in float32 at least, None without labels; NaN where no label counts.
        logits: (B, S, V) of the target; None in training, see `EncoderDecoder.forward`.
        encoder_last_hidden_state: (B, Ss, E), 0 at padding.
        decoder_hidden_states: L + 1 of (B, S, E).
        decoder_attentions: L of (B, H, S, S).
        cross_attentions: L of (B, H, S, Ss), 0 at padding of the source.
        encoder_hidden_states: L + 1 of (B, Ss, E), 0 at padding.
        encoder_attentions: L of (B, H, Ss, Ss).
    """

    loss: Tensor | None
    logits: Tensor | None
    encoder_last_hidden_state: Tensor
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


class EncoderDecoder(Pretrained, nn.Module):
    """A `Bert` whose output a `GPT` with cross-attention reads, projected where their widths differ.

    Padding of the source costs nothing, in the encoder and in cross-attention. Vaswani et al. 2017; Rothe et al. 2020,
    "Leveraging Pre-trained Checkpoints for Sequence Generation Tasks".
    """

    families = ENCODER_DECODERS
    generates = True

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Bert(config.encoder)
        self.decoder = GPT(config.decoder)
        self.enc_to_dec_proj = None
        if config.encoder.hidden_size != config.decoder.n_embd:
            self.enc_to_dec_proj = Linear(config.encoder.hidden_size, config.decoder.n_embd)
            _initialise(self.enc_to_dec_proj, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        return_logits: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Seq2SeqOutput:
        """Logits of the next token at every position of the target, and the mean cross-entropy of `labels`.

        Args:
            input_ids: (B, Ss) int64 or int32, the source's token ids.
            attention_mask: (B, Ss), nonzero = a real token of the source.
            decoder_input_ids: (B, S) int64 or int32, the decoder's input; positions are columns (RoBERTa's skip
                padding). By default config.decoder_start_token_id and then the labels but the last, with
                config.pad_token_id for -100.
            decoder_attention_mask: (B, S), nonzero = a real token. By default all are; where decoder_input_ids are made
                from labels, the first and all that are not padding.
            labels: (B, S) integers, the target at each position; -100 is ignored, and so are labels where the decoder's
                input is padding.
            token_type_ids: (B, Ss) integers, of the source.
            return_logits: whether to keep the logits. None = not where a model in training mode makes a loss with
                gradients.
            output_hidden_states, output_attentions: also return these of both parts.

        Raises:
            TypeError, ValueError: a tensor does not fit, as `Bert.forward` and `GPT.forward` say; there are neither
                decoder_input_ids nor labels, or the config lacks a token to make them of labels.
        """
        self.encoder._check_inputs(input_ids, attention_mask, token_type_ids, None, None)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids, made = self._shifted(labels)
            decoder_attention_mask = made if decoder_attention_mask is None else decoder_attention_mask
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids: got None, needs them or labels to make them of")
        self._check_target("decoder_input_ids", decoder_input_ids, input_ids.shape[:1])
        shape = tuple(decoder_input_ids.shape)
        for name, tensor in (("decoder_attention_mask", decoder_attention_mask), ("labels", labels)):
            if tensor is None:
                continue
            check_tensor(name, tensor)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, needs {shape}")
        if labels is not None:
            if labels.dtype not in INTEGER_DTYPES:
                raise ValueError(f"labels: got {labels.dtype}, needs integers")
            if decoder_attention_mask is not None:
                labels = labels.masked_fill(decoder_attention_mask == 0, IGNORE_INDEX)

        encoded = self.encoder.encode_tokens(
            input_ids, attention_mask, token_type_ids,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        out = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            labels,
            position_ids=count_positions(decoder_input_ids, None, None, 0, self.config.decoder),
            return_logits=return_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            memory=self._memory(encoded),
            labels_aligned=True,
        )
        return Seq2SeqOutput(
            out.loss, out.logits, encoded.tokens.pad(encoded.x), out.hidden_states, out.attentions,
            out.cross_attentions, encoded.hidden_states, encoded.attentions,
        )  # fmt: skip

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Ids of the targets, (B * num_return_sequences, P + n): the P given tokens and n new ones.

        They have the dtype of decoder_input_ids, and are int64 without.

        Each source is encoded once and its cross-attention keys and values are computed once, for all steps and beams;
        padding of the source is left out.

        Args:
            input_ids, attention_mask, token_type_ids: (B, Ss) of the source, as in `forward`.
            decoder_input_ids: (B, P) int64 or int32, the first tokens of the targets; by default decoder_start_token_id
                of generation_config or config, else bos_token_id.
            options: those of `fastattn.generation.generate`, such as max_new_tokens, num_beams, do_sample, seed.

        Raises:
            TypeError, ValueError: as `forward` and `fastattn.generation.generate`.
        """
        target, start = self.continuation(
            input_ids, attention_mask, decoder_input_ids=decoder_input_ids, token_type_ids=token_type_ids
        )
        with torch.no_grad(), evaluating(self):
            return generate(target, start, **options)

    def continuation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Continuation, Tensor]:
        """A causal model of the targets of sources, and the tokens (B, P) that these begin with.

        It encodes the sources when its first token is asked for. What `generate` and `fastattn.generation.stream_text`
        drive; arguments and errors are those of `generate`.
        """
        self.encoder._check_inputs(input_ids, attention_mask, token_type_ids, None, None)
        batch = input_ids.shape[:1]
        if decoder_input_ids is None:
            decoder_input_ids = input_ids.new_full((*batch, 1), self._start(), dtype=torch.int64)
        self._check_target("decoder_input_ids", decoder_input_ids, batch)

        def encode(invariant: bool) -> Memory:
            read = self._read_one_by_one if invariant else self.encoder.encode_tokens
            return replace(self._memory(read(input_ids, attention_mask, token_type_ids)), kept={})

        return Continuation(self.decoder, self.config, self.generation_config, encode), decoder_input_ids

    @classmethod
    def from_encoder_decoder(
        cls: type[Model],
        encoder: str | Path,
        decoder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        **tokens: Any,
    ) -> Model:
        """A model from two checkpoints, in eval mode, as a start for training.

        Cross-attention, which the decoder's folder does not have, is initialised and named in `load_report.new`, and so
        is the projection between different widths.

        Args:
            encoder: a folder or hub repository that `Bert.from_pretrained` reads.
            decoder: one of BERT or RoBERTa, whose head is new where the folder has none, or of GPT-2.
            dtype: of the weights; None for what the encoder's config.json says.
            tokens: decoder_start_token_id, pad_token_id, bos_token_id, eos_token_id of `EncoderDecoderConfig`.

        Raises:
            TypeError, ValueError: an argument; or a folder, with everything in it that does not fit.
        """
        if dtype is not None:
            dtype = float_dtype(dtype)
        folder = resolve_folder(decoder)
        entries = read_json(folder / "config.json")
        try:
            decoder_config = read_decoder(entries)
            family = decoder_family(decoder_config)
        except ValueError as error:
            raise ValueError(f"pretrained model: {folder / 'config.json'}: {error}") from None
        reader = Bert.from_pretrained(encoder, dtype=dtype)
        config = EncoderDecoderConfig(reader.config, decoder_config, **tokens)
        with torch.device("meta"), Uninitialised():
            writer = GPT(config.decoder)
        weights = open_weights(folder)
        transform = [part.theirs[0] for part in family.parts if part.ours == "lm_transform.dense.weight"]
        # without a head the folder may still hold the tied weight, but the head's bias is as new as its transform
        headless = bool(transform) and transform[0] not in set(map(family.plain, weights.names()))
        report = load_weights(
            writer, config.decoder, family, weights, new=(*NEW_IN_DECODER, "lm_transform.*", "lm_head.*"),
            fresh=("lm_head.bias",) if headless else (), dtype=reader.embeddings.word_embeddings.weight.dtype,
        )  # fmt: skip
        with torch.device("meta"), Uninitialised():
            model = cls(config)
        model.encoder, model.decoder = reader, writer
        new = [f"decoder.{name}" for name in report.new]
        if model.enc_to_dec_proj is not None:
            model.enc_to_dec_proj.to_empty(device="cpu").to(writer.wte.weight.dtype)
            _initialise(model.enc_to_dec_proj, config)
            new += ["enc_to_dec_proj.weight", "enc_to_dec_proj.bias"]
        of_encoder = reader.load_report or LoadReport()
        dropped = [f"encoder.{name}" for name in of_encoder.dropped]
        dropped += [f"decoder.{name}" for name in report.dropped]
        model.load_report = LoadReport(tuple(dropped), tuple(new))
        model.loaded_from = reader.loaded_from  # whose tokenizer reads the source
        return model.eval()

    @classmethod
    def fitted(
        cls, config: EncoderDecoderConfig, family: Family, names: frozenset[str]
    ) -> tuple[EncoderDecoderConfig, Family]:
        """With the rows of both parts, and without a pooler where the folder has none."""
        if config.encoder.pooler and "encoder.pooler.dense.weight" not in names:
            config = replace(config, encoder=replace(config.encoder, pooler=False))
        for row in cls.families:
            try:
                row.write_config(config)
            except ValueError:
                continue
            return config, row
        raise ValueError("config: no rows of an encoder and a decoder are those of this folder")

    def quantize(self: Model, kind: str | None = "int8") -> Model:
        """Let inference multiply with weights rounded to 8 bits in both parts, see their `quantize`; returns self."""
        self.encoder.quantize(kind)
        self.decoder.quantize(kind)
        self.quantized = kind
        return self

    def _memory(self, encoded: Encoded) -> Memory:
        x = encoded.x if self.enc_to_dec_proj is None else self.enc_to_dec_proj(encoded.x)  # (T, E)
        return Memory(x, encoded.tokens)

    def _read_one_by_one(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> Encoded:
        """The encoder's output of each source, encoded by itself without its padding."""
        encoder = self.encoder
        batch, seqlen = input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        positions = encoder._positions(input_ids, batch, seqlen, input_ids.device).expand(batch, seqlen)
        given = (input_ids, real, token_type_ids, positions)
        rows = []
        for i in range(batch):
            places = real[i].nonzero().squeeze(1)
            whole = len(places) and int(places[-1] - places[0]) == len(places) - 1
            kept = slice(int(places[0]), int(places[-1]) + 1) if whole else slice(None)
            encoded = encoder.encode_tokens(*(None if t is None else t[i : i + 1, kept] for t in given))
            alone = encoded.tokens
            masked = alone.real is not None and alone.places is None  # the padding is among the rows
            rows.append(encoded.x[real[i]] if masked else encoded.x)
        return Encoded(Tokens.of(real, batch, seqlen), torch.cat(rows))

    def _start(self) -> int:
        named = (self.generation_config or {}).get("decoder_start_token_id")
        for token in (named, self.config.decoder_start_token_id, self.config.bos_token_id):
            if token is not None:
                return int(token)
        raise ValueError(
            "decoder_input_ids: got None, and the config has neither decoder_start_token_id nor bos_token_id"
        )

    def _shifted(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """decoder_input_ids (B, S) made from labels (B, S), and a bool mask of those that are not padding."""
        check_tensor("labels", labels)
        if labels.dim() != 2 or labels.dtype not in INTEGER_DTYPES:
            got = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"labels: got {got}, needs integers of shape (batch, length)")
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        for name, token in (("decoder_start_token_id", start), ("pad_token_id", pad)):
            if token is None:
                raise ValueError(
                    f"decoder_input_ids: got None, and to make them of labels config.{name} is missing"
                )
        assert start is not None
        assert pad is not None
        check_targets("labels", labels, self.config.vocab_size, "vocab_size")
        first = labels.new_full((len(labels), 1), start, dtype=torch.int64)
        ids = torch.cat((first, labels.long()), 1)[:, :-1]  # of no labels, none
        ids = ids.masked_fill(ids == IGNORE_INDEX, pad)
        real = ids != pad
        real[:, :1] = True
        return ids, real

    def _check_target(self, name: str, ids: Tensor, batch: torch.Size) -> None:
        check_tensor(name, ids)
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.shape[:1] != batch:
            got = f"{ids.dtype} of shape {tuple(ids.shape)}"
            raise ValueError(
                f"{name}: got {got}, needs int64 or int32 of shape ({', '.join(map(str, batch))}, length)"
            )
        limit = self.decoder.max_positions
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(
                f"{name}: {ids.shape[1]} tokens is more than the decoder's learned positions, {limit}"
            )
        check_range(name, ids, self.config.vocab_size, "the decoder's vocab_size")


@torch.no_grad()
def _initialise(projection: Linear, config: EncoderDecoderConfig) -> None:
    projection.weight.normal_(0.0, config.initializer_range)
    projection.bias.zero_()
