"""BertForEmbedding: texts as vectors, in sentence-transformers' folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.bert_config import BertConfig
from fastattn.models.checkpoint import read_json, resolve_folder
from fastattn.models.encoded import Encoded
from fastattn.models.encoder import Bert
from fastattn.models.fields import flag, one_of, or_none
from fastattn.models.losses import widened
from fastattn.models.pretrained import PretrainedEncoder
from fastattn.nn.modes import evaluating
from fastattn.nn.unpadding import tokens_at_a_time
from fastattn.ops.arguments import is_integer

POOLINGS = ("mean", "cls", "max")
MODULES, SETTINGS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
SETTINGS_OF_OLD = tuple(  # read where the first is missing, in the order of sentence-transformers
    f"sentence_{kind}_config.json"
    for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_TRANSFORMER, _POOLING, _NORMALIZE = "Transformer", "Pooling", "Normalize"
Model = TypeVar("Model", bound="BertForEmbedding")


class EmbeddingOutput(NamedTuple):
    """The vectors of texts.

    Attributes:
        embeddings: (B, E), in the dtype of the weights.
        hidden_states: as in `fastattn.models.encoder.EncoderOutput`.
        attentions: the same.
    """

    embeddings: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BertForEmbedding(PretrainedEncoder, nn.Module):
    """A vector for each text: an encoder, a pooling over the real tokens, and a scaling to length 1 if `normalize`.

    Folders are sentence-transformers': modules.json has the pooling and the scaling. A folder without it, of a bare
    encoder, gets mean pooling without scaling, as in sentence-transformers. Reimers & Gurevych 2019.

    Args:
        config: of the encoder.
        pooling: "mean", "cls" (the first token) or "max".
        normalize: whether vectors are scaled to length 1.

    Attributes:
        max_seq_length: tokens of a text that `encode` reads; None for all positions.
        lower_case: whether `encode` puts texts into lower case first.
        prompts: by name, what `encode` may put in front of texts.
        default_prompt_name: which of them it puts there by default; None for none.

    Raises:
        ValueError: pooling or normalize is none of these.
    """

    with_prefix = False

    def __init__(self, config: BertConfig, *, pooling: str = "mean", normalize: bool = True) -> None:
        super().__init__()
        one_of(POOLINGS)("pooling", pooling)
        flag("normalize", normalize)
        self.config = config
        self.bert = Bert(config, add_pooler=False)
        self.pooling, self.normalize = pooling, normalize
        self.max_seq_length: int | None = None  # tokens of a text that `encode` reads; None for all positions
        self.lower_case = False  # whether `encode` puts texts into lower case first
        self.prompts: dict[str, str] = {}  # by name, what `encode` may put in front of texts
        self.default_prompt_name: str | None = None
        self._settings: dict[
            str, dict[str, Any]
        ] = {}  # entries of the folder's files that are only written again
        self._tokenizer: Any = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EmbeddingOutput:
        """Vectors (B, E); arguments and errors are those of `Bert.forward`."""
        encoded = self.bert.encode_tokens(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        return EmbeddingOutput(self._pooled(encoded), encoded.hidden_states, encoded.attentions)

    @torch.no_grad()
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> Tensor:
        """Vectors of texts, without gradients and dropout.

        Args:
            texts: one or several, tokenised by the folder's tokenizer.json and cut to `max_seq_length` tokens.
            batch_size: texts at a time, those of similar lengths together; None = as many as have 2,048 tokens together
                on a CPU, whose caches hold the activations of so many, and 8,192 on a GPU.
            prompt_name: which of `prompts` to put in front of each text; `default_prompt_name` by default.
            prompt: what to put in front instead.

        Returns:
            (N, E) in the order of the texts, or (E,) of a single text; on the model's device and in its dtype.

        Raises:
            TypeError: a text or prompt is not a str.
            ValueError: batch_size is below 1, prompt_name is unknown, or there is no tokenizer, see `tokenizer`.
        """
        single = isinstance(texts, str)
        listed = [texts] if single else list(texts)
        for index, text in enumerate(listed):
            if not isinstance(text, str):
                raise TypeError(f"texts[{index}]: got {type(text).__name__}, needs str")
        if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
            raise ValueError(f"batch_size: got {batch_size!r}, needs a positive integer or None")
        prepared = self.prepared(cast("list[str]", listed), prompt_name=prompt_name, prompt=prompt)
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(prepared)]
        device = self.bert.embeddings.word_embeddings.weight.device
        dtype = self.bert.embeddings.word_embeddings.weight.dtype
        out = torch.empty(len(ids), self.config.hidden_size, device=device, dtype=dtype)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        with evaluating(self):
            for part in _batches([len(ids[i]) for i in order], batch_size, tokens_at_a_time(device)):
                chosen = order[part]
                batch, mask = _padded([ids[i] for i in chosen], self.config.pad_token_id or 0)
                embeddings = self(batch.to(device), None if mask is None else mask.to(device)).embeddings
                out[torch.tensor(chosen, device=device)] = embeddings
        return out[0] if single else out

    def prepared(
        self, texts: Sequence[str], *, prompt_name: str | None = None, prompt: str | None = None
    ) -> list[str]:
        """Texts as they are tokenised: after the prompt of `encode`, all in lower case where the folder asks for that.

        Raises:
            TypeError: prompt is not a str.
            ValueError: prompt_name is unknown.
        """
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt: got {type(prompt).__name__}, needs str")
        front = self._prompt(prompt_name) if prompt is None else prompt
        whole = [front + text for text in texts]
        return [text.lower() for text in whole] if self.lower_case else whole

    @property
    def tokenizer(self) -> Any:
        """The folder's `tokenizers.Tokenizer`, cutting at `max_seq_length` and without padding.

        Raises:
            ValueError: the model is not from a folder, or that has no tokenizer.json.
        """
        if self._tokenizer is None:
            import tokenizers

            path = None if self.loaded_from is None else self.loaded_from / "tokenizer.json"
            if path is None or not path.is_file():
                raise ValueError(f"tokenizer: the model's folder has no tokenizer.json ({path})")
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        longest = self.config.max_position_embeddings - self.config.position_offset
        if self.max_seq_length is not None:
            longest = min(longest, self.max_seq_length)
        self._tokenizer.no_padding()  # those that files ask for
        self._tokenizer.enable_truncation(longest)
        return self._tokenizer

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_id: str | Path,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        **options: Any,
    ) -> Model:
        """A model in eval mode from a sentence-transformers folder, a bare encoder's, or the Hugging Face hub.

        Args:
            path_or_id: a folder, or a repository's name on the hub.
            pooling, normalize: override the folder's.
            options: those of `Pretrained.from_pretrained`, whose errors apply too.

        Raises:
            ValueError: the folder has modules, or a pooling, that are not computed here; the message names them.
        """
        or_none(one_of(POOLINGS))("pooling", pooling)
        or_none(flag)("normalize", normalize)
        folder = resolve_folder(path_or_id)
        layout = _read_layout(folder)
        model = super().from_pretrained(folder / layout.encoder, **options)
        model.pooling = layout.pooling if pooling is None else pooling
        model.normalize = layout.normalize if normalize is None else normalize
        model.max_seq_length, model.lower_case = layout.max_seq_length, layout.lower_case
        model.prompts, model.default_prompt_name = layout.prompts, layout.default_prompt_name
        model._settings = layout.settings
        return model

    def extra_files(self) -> Mapping[str, bytes]:
        """The files that sentence-transformers reads besides the encoder's."""
        paths = {_TRANSFORMER: "", _POOLING: "1_Pooling"}
        if self.normalize:
            paths[_NORMALIZE] = "2_Normalize"
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(paths.items())
        ]
        pooling = {
            "word_embedding_dimension": self.config.hidden_size,
            **{key: name == self.pooling for name, key in _POOLING_KEYS.items()},
        }
        settings = {"max_seq_length": self.max_seq_length, "do_lower_case": self.lower_case}
        prompts = {"prompts": self.prompts, "default_prompt_name": self.default_prompt_name}
        entries: dict[str, Any] = {
            MODULES: modules,
            SETTINGS: {**self._settings.get(SETTINGS, {}), **settings},
            PROMPTS: {**self._settings.get(PROMPTS, {}), **prompts},
            "1_Pooling/config.json": pooling,
        }
        if self.normalize:
            entries["2_Normalize/config.json"] = {}
        return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in entries.items()}

    def _pooled(self, encoded: Encoded) -> Tensor:
        """(B, E), computed in float32 at least."""
        tokens = encoded.tokens
        if self.pooling == "cls":
            x = encoded.first()
            pooled = widened(x)
        else:
            x = encoded.x
            pooled = (tokens.mean if self.pooling == "mean" else tokens.max)(widened(x))
        if self.normalize:
            pooled = F.normalize(pooled, dim=-1)
        return pooled.to(x.dtype)

    def _prompt(self, name: str | None) -> str:
        name = self.default_prompt_name if name is None else name
        if name is not None and name not in self.prompts:
            raise ValueError(f"prompt_name: got {name!r}, needs one of {', '.join(self.prompts) or 'none'}")
        return "" if name is None else self.prompts[name]


def encoder_folder(path_or_id: str | Path) -> Path:
    """The folder that holds the encoder: a part of one in sentence-transformers' layout, else the folder itself."""
    folder = resolve_folder(path_or_id)
    return folder / _read_layout(folder).encoder


class _Layout(NamedTuple):
    """The settings of a sentence-transformers folder besides its encoder."""

    encoder: str = ""  # its folder within
    pooling: str = "mean"
    normalize: bool = False
    max_seq_length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = {}  # noqa: RUF012
    default_prompt_name: str | None = None
    settings: dict[str, dict[str, Any]] = {}  # noqa: RUF012, by file


_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
}


def _read_layout(folder: Path) -> _Layout:
    """The layout of a folder; ValueError names what is not computed here."""
    path = folder / MODULES
    if not path.is_file():
        return _Layout()
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"pretrained model: {path} is not a list of modules: {error!r}") from None
    for _, inside in kinds:
        if not isinstance(inside, str) or Path(inside).is_absolute() or ".." in Path(inside).parts:
            raise ValueError(
                f"pretrained model: {path} names the module {inside!r}, needs a path inside the folder"
            )
    found = dict(kinds)
    names = [kind for kind, _ in kinds]
    if names not in ([_TRANSFORMER, _POOLING], [_TRANSFORMER, _POOLING, _NORMALIZE]):
        raise ValueError(
            f"pretrained model: {path} has the modules {', '.join(names)}, needs Transformer, Pooling and "
            f"perhaps Normalize"
        )
    encoder = found[_TRANSFORMER]
    written = [name for name in (SETTINGS, *SETTINGS_OF_OLD) if (folder / encoder / name).is_file()]
    settings = read_json(folder / encoder / written[0]) if written else {}
    prompts = _optional(folder / PROMPTS)
    longest = settings.get("max_seq_length") or _optional(folder / encoder / "tokenizer_config.json").get(
        "model_max_length"
    )
    return _Layout(
        encoder,
        _read_pooling(folder / found[_POOLING] / "config.json"),
        _NORMALIZE in found,
        int(longest) if isinstance(longest, (int, float)) and longest < 1e9 else None,
        bool(settings.get("do_lower_case", False)),
        prompts.get("prompts") or {},
        prompts.get("default_prompt_name"),
        {SETTINGS: settings, PROMPTS: prompts},
    )


def _read_pooling(path: Path) -> str:
    """The pooling of a config, of today's form ("pooling_mode": "mean") or with a flag for each."""
    entries = read_json(path)
    modes = entries.get("pooling_mode")
    if modes is None:
        modes = [key for key, on in entries.items() if key.startswith("pooling_mode_") and on]
    modes = [modes] if isinstance(modes, str) else list(modes)
    ours = {**{key: name for name, key in _POOLING_KEYS.items()}, **{name: name for name in POOLINGS}}
    if len(modes) != 1 or modes[0] not in ours:
        raise ValueError(
            f"pretrained model: {path}: got the pooling {modes}, needs one of {', '.join(POOLINGS)}"
        )
    if entries.get("include_prompt", True) is not True:
        raise ValueError(f"pretrained model: {path}: include_prompt: got False, only True is supported")
    return ours[modes[0]]


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _batches(lengths: Sequence[int], size: int | None, most_tokens: int) -> Iterator[slice]:
    """Slices of texts with these numbers of tokens: `size` in each, or as many as have `most_tokens` together."""
    start = 0
    while start < len(lengths):
        stop = start + (size or 1)
        if size is None:
            total = lengths[start]
            while stop < len(lengths) and (total := total + lengths[stop]) <= most_tokens:
                stop += 1
        yield slice(start, stop)
        start = stop


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor | None]:
    """Ids (B, S) and their mask, None where all are of one length."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device="cpu")
    if all(len(row) == longest for row in rows):
        return ids, None
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    return ids, torch.arange(longest, device="cpu") < lengths[:, None]
