"""Everything about models: loading them, their families, prompts and token ids, and one handle on their projections."""

from nt_utils.models.families import FAMILIES, OWNED, check_family, context_of
from nt_utils.models.language import LanguageModel
from nt_utils.models.loading import check_source, load, load_prompter, parse_arguments
from nt_utils.models.locate import located
from nt_utils.models.prompting import Encoded, Prompter, pad
from nt_utils.models.view import (
    DecoderView,
    Projection,
    check_evaluating,
    decoder,
    device_of,
    is_adapter_layer,
    is_sharded,
)

__all__ = [
    "FAMILIES",
    "OWNED",
    "DecoderView",
    "Encoded",
    "LanguageModel",
    "Projection",
    "Prompter",
    "check_evaluating",
    "check_family",
    "check_source",
    "context_of",
    "decoder",
    "device_of",
    "is_adapter_layer",
    "is_sharded",
    "load",
    "load_prompter",
    "located",
    "pad",
    "parse_arguments",
]
