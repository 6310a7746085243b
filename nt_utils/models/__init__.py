"""Everything about models: loading them, their families, and one handle on their projections."""

from nt_utils.models.families import FAMILIES, FUSED, OWNED, Family, check_family
from nt_utils.models.language import Encoded, LanguageModel, pad
from nt_utils.models.loading import check_source, load
from nt_utils.models.view import DecoderView, Projection, decoder, device_of, is_sharded, tensor_of

__all__ = [
    "DecoderView",
    "Encoded",
    "FAMILIES",
    "FUSED",
    "Family",
    "LanguageModel",
    "OWNED",
    "Projection",
    "check_family",
    "check_source",
    "decoder",
    "device_of",
    "is_sharded",
    "load",
    "pad",
    "tensor_of",
]
