"""Checkpoints: folders in transformers' formats and repositories on the Hugging Face hub, both ways."""

from fastattn.models.checkpoint.families import DECODERS as DECODERS
from fastattn.models.checkpoint.families import ENCODER_DECODERS as ENCODER_DECODERS
from fastattn.models.checkpoint.families import ENCODERS as ENCODERS
from fastattn.models.checkpoint.families import FAMILIES as FAMILIES
from fastattn.models.checkpoint.families import family_for as family_for
from fastattn.models.checkpoint.folder import Tensors as Tensors
from fastattn.models.checkpoint.folder import open_weights as open_weights
from fastattn.models.checkpoint.folder import read_json as read_json
from fastattn.models.checkpoint.hub import resolve_folder as resolve_folder
from fastattn.models.checkpoint.load import load_model as load_model
from fastattn.models.checkpoint.load import load_weights as load_weights
from fastattn.models.checkpoint.names import Family as Family
from fastattn.models.checkpoint.names import Part as Part
from fastattn.models.checkpoint.pretrained import Pretrained as Pretrained
from fastattn.models.checkpoint.report import LoadReport as LoadReport
from fastattn.models.checkpoint.save import save_model as save_model
from fastattn.models.checkpoint.swap import write_folder as write_folder
