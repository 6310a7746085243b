"""The only place where hooks are registered: capture, ablate, scale and replace as context managers.

A site is (layer, kind): the output channels of q, k and v (bias included, before any query/key norm and rotary
embedding), the input channels of the attention's output projection (o) and of the down projection (ffn), the output
channels of the gate and up projections. Beside the sites there is the residual stream between the layers. Hooks are registered on entry and removed on exit whatever
happens; they nest, the outer one acting first; no activation is edited in place; a selection that matches nothing is
an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nt_utils.errors import InputError
from nt_utils.models import DecoderView, LanguageModel
from nt_utils.neurons import NeuronSet, Site

Edit = Callable[[Tensor], Tensor | None]


def _view(source: LanguageModel | DecoderView) -> DecoderView:
    return source if isinstance(source, DecoderView) else source.view


@contextmanager
def registered(register: Iterable[Callable]) -> Iterator[None]:
    """Call each ``register`` (which returns a removable handle) on entry, remove every handle on exit."""
    handles = []
    try:
        for add in register:
            handles.append(add())
        yield
    finally:
        for handle in handles:
            handle.remove()


def before(module: nn.Module, function: Callable) -> Callable:
    """A registration of ``function(module, args)`` before each call of a module."""
    return lambda: module.register_forward_pre_hook(function)


def after(module: nn.Module, function: Callable, first: bool = False) -> Callable:
    """A registration of ``function(module, args, output)`` after each call; ``first``: before the other hooks there."""
    return lambda: module.register_forward_hook(function, prepend=first)


def after_gradient(parameter: nn.Parameter, function: Callable) -> Callable:
    """A registration of ``function(parameter)`` after each time its gradient was accumulated."""
    return lambda: parameter.register_post_accumulate_grad_hook(function)


def _at_site(view: DecoderView, site: Site, edit: Edit) -> Callable:
    """A registration that hands ``edit`` the site's channels [batch, tokens, width]; None leaves them as they are."""
    layer, kind = site
    projection = view.projection(layer, kind)  # raises on an unknown site

    def on_input(module: nn.Module, args: tuple) -> tuple | None:
        edited = edit(args[0])
        return None if edited is None else (edited, *args[1:])

    def on_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        edited = edit(projection.take(output))
        return None if edited is None else projection.put(output, edited)

    if kind in ("o", "ffn"):
        return before(projection.module, on_input)
    return after(projection.module, on_output)


@contextmanager
def edit(source: LanguageModel | DecoderView, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Apply ``edits[site](activation [batch, tokens, width]) -> new activation`` at each site."""
    if not edits:
        raise InputError("sites: the selection is empty; nothing would be hooked")
    view = _view(source)
    with registered([_at_site(view, site, function) for site, function in edits.items()]):
        yield


@contextmanager
def observe(calls: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Call ``function(args, kwargs)`` before each call of a module (for readers outside the sites)."""

    def register(module: nn.Module, function: Callable) -> Callable:
        def hook(_module, args, kwargs):
            function(args, kwargs)

        return lambda: module.register_forward_pre_hook(hook, with_kwargs=True)

    with registered([register(module, function) for module, function in calls]):
        yield


@contextmanager
def capture(source: LanguageModel | DecoderView, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """Yield a dict that holds, after each forward, the activations [batch, tokens, width] of the sites.

    The tensors are the model's own (part of the graph when gradients are on) and live as long as the dict does.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Edit:
        def store(activation: Tensor) -> None:
            seen[site] = activation

        return store

    with edit(source, {site: keep(site) for site in sites}):
        yield seen


def _like(values: Tensor, activation: Tensor) -> Tensor:
    return values.to(device=activation.device, dtype=activation.dtype)


def _check_width(view: DecoderView, site: Site, values: Tensor, name: str) -> None:
    width = view.space.width(site)
    if values.shape[-1] != width:
        raise InputError(f"{name}: {site} has {width} channels, got {values.shape[-1]}")


@contextmanager
def scale(source: LanguageModel | DecoderView, factors: Mapping[Site, Tensor]) -> Iterator[None]:
    """Multiply each site's channels by ``factors[site]`` [width]; gradients flow into the factors."""
    view = _view(source)
    for site, values in factors.items():
        _check_width(view, site, values, "factors")

    def times(values: Tensor) -> Edit:
        return lambda x: x * _like(values, x)

    with edit(view, {site: times(values) for site, values in factors.items()}):
        yield


@contextmanager
def ablate(source: LanguageModel | DecoderView, neurons: NeuronSet) -> Iterator[None]:
    """Set the channels of these neurons to 0 (bias included).

    Raises:
        InputError: the set is empty or belongs to another architecture.
    """
    view = _view(source)
    if neurons.space.architecture != view.space.architecture:
        raise InputError(
            f"neurons: found on architecture {neurons.space.architecture}; the model at hand is {view.space.architecture}"
        )

    def zero(mask: Tensor) -> Edit:
        return lambda x: x.masked_fill(mask.to(x.device), 0)

    with edit(view, {site: zero(mask) for site, mask in neurons.masks.items()}):
        yield


@contextmanager
def replace(source: LanguageModel | DecoderView, values: Mapping[Site, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put ``values`` in the masked channels.

    Args:
        values: site -> (mask bool [width], new values [width] or anything that broadcasts to [batch, tokens, width]).
    """
    view = _view(source)
    for site, (mask, new) in values.items():
        _check_width(view, site, mask, "mask")
        _check_width(view, site, new, "values")
        if not mask.any():
            raise InputError(f"mask: selects no channel of {site}")

    def put(mask: Tensor, new: Tensor) -> Edit:
        return lambda x: torch.where(mask.to(x.device), _like(new, x), x)

    with edit(view, {site: put(*pair) for site, pair in values.items()}):
        yield


@contextmanager
def residual(source: LanguageModel | DecoderView, edits: Mapping[int, Edit]) -> Iterator[None]:
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

    def register(place: int, function: Edit) -> Callable:
        if place == 0:
            return lambda: view.layers[0].register_forward_pre_hook(_on_input(function), with_kwargs=True)
        return after(view.layers[place - 1], _on_first_output(function))

    with registered([register(place, function) for place, function in edits.items()]):
        yield


@contextmanager
def attention_output(source: LanguageModel | DecoderView, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Apply ``edits[layer]`` to what the layer's attention module gives out [batch, tokens, hidden size]."""
    view = _view(source)
    if not edits:
        raise InputError("layers: the selection is empty; nothing would be hooked")
    with registered([after(view.attention(i), _on_first_output(function)) for i, function in edits.items()]):
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

    The layers before it are not run (nor are hooks inside them); embedding, masks, the layers from ``layer`` on, the
    last norm and the head are the model's own. Layer 0 skips nothing and ignores ``hidden``.

    Raises:
        InputError: no such layer.
    """
    view = _view(source)
    if not 0 <= layer < view.num_layers:
        raise InputError(f"layer: got {layer}; the model has layers 0 to {view.num_layers - 1}")
    skipped = [view.layers[i] for i in range(layer)]
    # An instance's own forward (accelerate sets one) is put back; otherwise the class's shows again.
    before = [block.__dict__.get("forward") for block in skipped]
    try:
        for block in skipped:
            block.__dict__["forward"] = lambda *args, **kwargs: hidden
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward
