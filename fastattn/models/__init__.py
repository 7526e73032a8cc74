"""Models on fastattn's attention."""

from fastattn.models.bert_config import BertConfig as BertConfig
from fastattn.models.config import GPTConfig as GPTConfig
from fastattn.models.decoder import GPT as GPT
from fastattn.models.embedding import BertForEmbedding as BertForEmbedding
from fastattn.models.encoder import Bert as Bert
from fastattn.models.encoder_decoder import EncoderDecoder as EncoderDecoder
from fastattn.models.encoder_decoder_config import EncoderDecoderConfig as EncoderDecoderConfig
from fastattn.models.encoder_decoder_config import bert_decoder as bert_decoder
from fastattn.models.families import load as load
from fastattn.models.heads import BertForMaskedLM as BertForMaskedLM
from fastattn.models.heads import BertForPreTraining as BertForPreTraining
from fastattn.models.heads import BertForQuestionAnswering as BertForQuestionAnswering
from fastattn.models.heads import BertForSequenceClassification as BertForSequenceClassification
from fastattn.models.heads import BertForTokenClassification as BertForTokenClassification
