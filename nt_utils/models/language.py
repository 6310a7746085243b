"""A causal language model with its tokenizer, chat template and view."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from nt_utils.errors import ModelError
from nt_utils.models import identity
from nt_utils.models.prompting import Prompter
from nt_utils.models.view import DecoderView, device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel(Prompter):
    """A causal language model together with what turns prompts into its token ids.

    Args:
        model: a ``transformers`` causal language model, with or without adapters (a ``PeftModel`` is taken apart).
        tokenizer, name, system_prompt, more: as for :class:`~nt_utils.models.prompting.Prompter`.

    Attributes:
        dtype_reason: why its weights have the precision they have, for provenance.
    """

    dtype_reason = "as given"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        system_prompt: str | None = None,
        **more: Any,
    ):
        given: Any = model
        if hasattr(given, "get_base_model"):
            if given.active_peft_config.is_prompt_learning:
                raise ModelError("model: a PeftModel that adds virtual tokens to every prompt is not supported")
            given = given.get_base_model()  # its layers hold the adapters
        self.model: PreTrainedModel = given
        # Under a mask, cuDNN's attention has NaN gradients at some lengths on H100 and H200 (torch 2.11 to 2.13, pytorch
        # issue 196678). The other kernels do not, and a CPU has no use for it.
        torch.backends.cuda.enable_cudnn_sdp(False)
        super().__init__(tokenizer, name, system_prompt, **more)

    @cached_property
    def view(self) -> DecoderView:
        """The uniform handle on its projections."""
        return DecoderView(self.model)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self.model.get_input_embeddings())

    @property
    def config(self) -> Any:
        """The model's config as it is now."""
        return self.model.config

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a response: the tokenizer's, the generation config's and the template's end of turn."""
        named = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return tuple(sorted({*super().stop_ids, *([named] if isinstance(named, int) else named or [])}))

    @property
    def weights_fingerprint(self) -> str:
        """Hash over the names and values of all weights as they are now."""
        return identity.weights_fingerprint(self.model)

    def weights_changed(self, known: str | None = None, names: Collection[str] | None = None) -> None:
        """Forget the kept fingerprint; ``known``: the weights are again, bit for bit, those of that fingerprint.

        ``names``: which weights (None: all)."""
        identity.weights_changed(self.model, known, names)

    def identity(self, intervention_key: str | None = "") -> str | None:
        """What acts on the model's output, or None (:func:`nt_utils.models.identity.identity`)."""
        return identity.identity(self, intervention_key)
