"""The only place where hooks are registered: capture, ablate, scale and replace as context managers.

A site is (layer, kind): the output channels of q, k and v (bias included, before any query/key norm and rotary
embedding), the input channels of the attention's output projection (o) and of the down projection (ffn), the output
channels of the gate and up projections. Beside the sites there is the residual stream between the layers. Hooks are
registered on entry and removed on exit whatever happens; they nest, the outer one acting first; no activation is edited
in place. A selection that matches nothing is an error, and so is a context none of whose hooks ran before it closed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nt_utils.errors import InputError, ModelError
from nt_utils.models import DecoderView, LanguageModel
from nt_utils.neurons import NeuronSet, Site

Edit = Callable[[Tensor], Tensor | None]


def _view(source: LanguageModel | DecoderView) -> DecoderView:
    refuse_compiled(source.model)
    return source if isinstance(source, DecoderView) else source.view


@dataclass(frozen=True)
class Hook:
    """A hook to come: ``add`` registers the function it is given on ``owner`` and returns a removable handle."""

    owner: nn.Module | nn.Parameter
    function: Callable
    add: Callable[[Callable], Any]


@contextmanager
def attached(hooks: Iterable[Hook], name: str = "hooks", must_run: bool = True) -> Iterator[None]:
    """Register the hooks on entry, remove every one on exit.

    ``must_run``: whether it is an error that none ran (a training may end before its first step).

    Raises:
        ModelError: on entry, where a module is compiled or scripted (torch may leave out hooks there without a word); on
            exit without another error, where none of the hooks ran, so that ``name`` changed and saw nothing.
    """
    calls = 0

    def counted(function: Callable) -> Callable:
        def hook(*args, **kwargs):
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return hook

    handles, hooks = [], list(hooks)
    try:
        for hook in hooks:
            if isinstance(hook.owner, nn.Module):
                refuse_compiled(hook.owner)
            handles.append(hook.add(counted(hook.function)))
        yield
        if must_run and hooks and not calls:
            raise ModelError(
                f"{name}: none of its {len(hooks)} hooks ran before it was taken off, so it changed nothing; was the model "
                "called, and is it the one that the hooks are on (a compiled copy leaves them out)?"
            )
    finally:
        for handle in handles:
            handle.remove()


def refuse_compiled(model: nn.Module) -> None:
    """Raise ModelError where a module is compiled (torch.compile) or scripted (torch.jit): hooks may not run there."""
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        compiled |= hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        if compiled or isinstance(module, torch.jit.ScriptModule):
            way = "torch.compile" if compiled else "torch.jit"
            raise ModelError(
                f"model: {name or type(module).__name__} is compiled by {way}, which leaves hooks out; give the plain model"
            )


def before(module: nn.Module, function: Callable) -> Hook:
    """``function(module, args)`` before each call of a module."""
    return Hook(module, function, module.register_forward_pre_hook)


def after(module: nn.Module, function: Callable, first: bool = False) -> Hook:
    """``function(module, args, output)`` after each call; ``first``: before the other hooks there."""
    return Hook(module, function, partial(module.register_forward_hook, prepend=first))


def after_gradient(parameter: nn.Parameter, function: Callable) -> Hook:
    """``function(parameter)`` after each time its gradient was accumulated."""
    return Hook(parameter, function, parameter.register_post_accumulate_grad_hook)


def _at_site(view: DecoderView, site: Site, edit: Edit) -> Hook:
    """A hook that hands ``edit`` the site's channels [batch, tokens, width]; None leaves them as they are."""
    layer, kind = site
    projection = view.projection(layer, kind)  # raises on an unknown site

    def on_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        edited = edit(projection.take(output))
        return None if edited is None else projection.put(output, edited)

    if kind in ("o", "ffn"):
        return _before_with_keywords(projection.module, _on_input(edit))
    return after(projection.module, on_output)


@contextmanager
def edit(source: LanguageModel | DecoderView, edits: Mapping[Site, Edit], name: str = "edit") -> Iterator[None]:
    """Apply ``edits[site](activation [batch, tokens, width]) -> new activation`` at each site."""
    if not edits:
        raise InputError("sites: the selection is empty; nothing would be hooked")
    view = _view(source)
    with attached([_at_site(view, site, function) for site, function in edits.items()], name):
        yield


@contextmanager
def observe(calls: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Call ``function(args, kwargs)`` before each call of a module (for readers outside the sites)."""

    def read(_module, args, kwargs, function: Callable) -> None:
        function(args, kwargs)

    hooks = [_before_with_keywords(module, partial(read, function=function)) for module, function in calls]
    with attached(hooks, "observe"):
        yield


def _before_with_keywords(module: nn.Module, function: Callable) -> Hook:
    return Hook(module, function, partial(module.register_forward_pre_hook, with_kwargs=True))


@contextmanager
def capture(source: LanguageModel | DecoderView, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """Yield a dict that holds, after each forward, the activations [batch, tokens, width] of the sites.

    The tensors are the model's own (part of the graph when gradients are on) and live as long as the dict does.
    """
    seen: dict[Site, Tensor] = {}

    def keep(activation: Tensor, site: Site) -> None:
        seen[site] = activation

    with edit(source, {site: partial(keep, site=site) for site in sites}, "capture"):
        yield seen


def _like(values: Tensor, activation: Tensor) -> Tensor:
    return values.to(device=activation.device, dtype=activation.dtype)


def _check_width(view: DecoderView, site: Site, values: Tensor, name: str) -> None:
    width = view.space.width(site)
    if values.shape[-1] != width:
        raise InputError(f"{name}: {site} has {width} channels, got {values.shape[-1]}")


@contextmanager
def scale(source: LanguageModel | DecoderView, factors: Mapping[Site, Tensor], name: str = "scale") -> Iterator[None]:
    """Multiply each site's channels by ``factors[site]`` [width]; gradients flow into the factors."""
    view = _view(source)
    for site, values in factors.items():
        _check_width(view, site, values, "factors")

    def times(x: Tensor, factor: Tensor) -> Tensor:
        return x * _like(factor, x)

    with edit(view, {site: partial(times, factor=factor) for site, factor in factors.items()}, name):
        yield


@contextmanager
def ablate(source: LanguageModel | DecoderView, neurons: NeuronSet, name: str = "ablate") -> Iterator[None]:
    """Set the channels of these neurons to 0 (bias included).

    Raises:
        InputError: the set is empty or belongs to another architecture.
    """
    view = _view(source)
    neurons.space.check("neurons: found on", view.space)

    def zero(x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(mask.to(x.device), 0)

    with edit(view, {site: partial(zero, mask=mask) for site, mask in neurons.masks.items()}, name):
        yield


@contextmanager
def replace(
    source: LanguageModel | DecoderView, values: Mapping[Site, tuple[Tensor, Tensor]], name: str = "replace"
) -> Iterator[None]:
    """Put ``values`` in the masked channels.

    Args:
        values: site -> (mask bool [width], new values [width], or [batch, tokens, width]).
    """
    view = _view(source)
    for site, (mask, new) in values.items():
        _check_width(view, site, mask, "mask")
        _check_width(view, site, new, "values")
        if not mask.any():
            raise InputError(f"mask: selects no channel of {site}")

    def put(x: Tensor, mask: Tensor, new: Tensor) -> Tensor:
        return torch.where(mask.to(x.device), _like(new, x), x)

    with edit(view, {site: partial(put, mask=mask, new=new) for site, (mask, new) in values.items()}, name):
        yield


@contextmanager
def residual(source: LanguageModel | DecoderView, edits: Mapping[int, Edit], name: str = "residual") -> Iterator[None]:
    """Apply ``edits[place](stream [batch, tokens, hidden size]) -> new stream`` (None leaves it) between the layers.

    Place 0 is what enters the first layer, place n what leaves layer n - 1.

    Raises:
        InputError: no edits, or no such place.
    """
    view = _view(source)
    if not edits:
        raise InputError("places: the selection is empty; nothing would be hooked")
    for place in edits:
        if not 0 <= place <= view.num_layers:
            raise InputError(f"place: got {place}; the residual stream has places 0 to {view.num_layers}")

    def hook(place: int, function: Edit) -> Hook:
        if place == 0:
            return _before_with_keywords(view.layers[0], _on_input(function))
        return after(view.layers[place - 1], _on_first_output(function))

    with attached([hook(place, function) for place, function in edits.items()], name):
        yield


@contextmanager
def written(source: LanguageModel | DecoderView, function: Edit, name: str = "written") -> Iterator[None]:
    """Apply ``function`` to everything that is written into the residual stream [batch, tokens, hidden size].

    That is what enters the first layer, and what each attention and feed-forward block adds: behind its last norm where
    the family has one there (Gemma 2 and 3, OLMo 2), so that nothing acts on it before it is added.
    """
    view = _view(source)
    writers = [view.writer(layer, kind) for layer in range(view.num_layers) for kind in ("o", "ffn")]
    start = _before_with_keywords(view.layers[0], _on_input(function))
    with attached([start, *(after(module, _on_first_output(function)) for module in writers)], name):
        yield


def _on_input(edit: Edit) -> Callable:
    def hook(_module, args: tuple, kwargs: dict) -> tuple | None:
        stream = args[0] if args else kwargs["hidden_states"]
        edited = edit(stream)
        if edited is None:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return hook


def _on_first_output(edit: Edit) -> Callable:
    """Modules give a tensor, or a tuple that starts with it."""

    def hook(_module, _args, output):
        several = isinstance(output, tuple)
        edited = edit(output[0] if several else output)
        if edited is None:
            return None
        return (edited, *output[1:]) if several else edited

    return hook


@contextmanager
def start_at(source: LanguageModel | DecoderView, layer: int, hidden: Tensor) -> Iterator[None]:
    """Let the model's forward go on as if ``hidden`` [batch, tokens, hidden size] had entered ``layer``.

    The layers before it are not run, nor are hooks on them or inside them: ``hidden`` has what they did; embedding,
    masks, the layers from ``layer`` on, the last norm and the head are the model's own. Layer 0 skips nothing and ignores
    ``hidden``.

    Raises:
        InputError: no such layer.
    """
    view = _view(source)
    if not 0 <= layer < view.num_layers:
        raise InputError(f"layer: got {layer}; the model has layers 0 to {view.num_layers - 1}")
    skipped = [view.layers[i].__dict__ for i in range(layer)]
    # An instance's own forward (accelerate sets one) is put back; otherwise the class's shows again.
    names = ("forward", "_forward_hooks", "_forward_pre_hooks")
    before = [{name: block[name] for name in names if name in block} for block in skipped]
    try:
        for block in skipped:
            block["forward"] = lambda *args, **kwargs: hidden
            block["_forward_hooks"], block["_forward_pre_hooks"] = OrderedDict(), OrderedDict()
        yield
    finally:
        for block, kept in zip(skipped, before, strict=True):
            block.pop("forward", None)
            block.update(kept)
