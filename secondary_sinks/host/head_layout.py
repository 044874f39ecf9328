"""How a model lays out activations that have heads, and the one layout that this library uses.

The sites `q`, `k`, `v` and `z` are [batch, token, head, d_head] here. TransformerLens shows them in
another way in some models:

* latent attention (DeepSeek) has [batch, head, token, d_head]; with as many heads as tokens nothing
  would tell an edit of one token from an edit of one head;
* gated attention (Qwen3-Next) has the gate behind each query, as one more head;
* where the heads of attention have another width than the configuration says (DeepSeek, Gemma 4),
  the numbers are divided into the wrong number of heads, or not at all.

So the first time that such a site of a model is read or edited, a pass over a few tokens shows the
shapes in every layer. Their number is a prime that is no number of heads, so that the axis of
tokens is the one of that length. `host.forward` applies the layouts; nothing else needs them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from secondary_sinks.errors import ModelError
from secondary_sinks.host.hooks_aside import hooks_aside
from secondary_sinks.host.memory import input_device
from secondary_sinks.host.model_info import name_of
from secondary_sinks.host.sites import SITE_HOOKS, Site, spell_site

HEAD_SITES = ("q", "k", "v", "z")
"""Sites whose layout is examined."""

_PROBE_LENGTHS = (11, 13, 17, 19)


@dataclass(frozen=True)
class HeadLayout:
    """How one site of one layer differs from [batch, token, head, d_head]."""

    _PARTS: ClassVar[str] = "batch token (head part d) -> part batch token head d"

    n_heads: int
    heads_first: bool = False
    """[batch, head, token, d_head]."""
    gated: bool = False
    """Each head is followed by its gate."""

    def read(self, shown: Tensor) -> Float[Tensor, " batch token head d_head"]:
        """The activation that a model shows, in this library's layout."""
        value = (shown.transpose(1, 2) if self.heads_first else shown).flatten(2)
        if self.gated:
            return rearrange(value, self._PARTS, head=self.n_heads, part=2)[0]
        return rearrange(value, "batch token (head d) -> batch token head d", head=self.n_heads)

    def write(self, shown: Tensor, new: Float[Tensor, " batch token head d_head"]) -> Tensor:
        """A new activation in the layout of the one that the model shows."""
        if self.gated:
            gate = rearrange(shown.flatten(2), self._PARTS, head=self.n_heads, part=2)[1]
            both = rearrange([new, gate], "part batch token head d -> batch token head part d")
            return both.reshape(shown.shape)
        return new.transpose(1, 2) if self.heads_first else new.reshape(shown.shape)


_layouts: weakref.WeakKeyDictionary[Any, dict[Site, HeadLayout | str | None]] = (
    weakref.WeakKeyDictionary()
)
"""Of the models that were examined: None where the layout is this library's, or what is wrong."""


def head_layout(model: Any, site: Site) -> HeadLayout | None:
    """How a site differs from this library's layout; None if it does not, or has no heads.

    Raises:
        ModelError: the axes of the site are not known.
    """
    if site.name not in HEAD_SITES:
        return None
    examine_heads(model)
    layout = _layouts[model].get(site)
    if isinstance(layout, str):
        raise ModelError(
            f"{spell_site(site)} of {name_of(model)!r} {layout}, not [batch, token, head, d_head]; "
            "it cannot be read or edited token by token: leave this site out"
        )
    return layout


def examine_heads(model: Any) -> None:
    """Find the layouts of a model, once.

    The pass must show every site, so it comes before blocks are skipped or attention is replaced.
    """
    if model not in _layouts:
        _layouts[model] = _examine(model)


def in_layout(
    layout: HeadLayout | None, editor: Callable[[Tensor], Tensor | None]
) -> Callable[[Tensor], Tensor | None]:
    """The same function of what a model shows, for a function of this library's layout."""
    if layout is None:
        return editor

    def edit(shown: Tensor) -> Tensor | None:
        new = editor(layout.read(shown))
        return None if new is None else layout.write(shown, new)

    return edit


def _examine(model: Any) -> dict[Site, HeadLayout | str | None]:
    """The layouts of all layers, from the shapes in one pass."""
    n_heads = int(model.cfg.n_heads)
    known = {n_heads, 2 * n_heads, int(getattr(model.cfg, "n_key_value_heads", None) or n_heads)}
    n_tokens = next(length for length in _PROBE_LENGTHS if length not in known)
    shapes = _shapes(model, min(n_tokens, int(getattr(model.cfg, "n_ctx", None) or n_tokens)))
    layouts: dict[Site, HeadLayout | str | None] = {}
    for layer in range(int(model.cfg.n_layers)):
        of_layer = {
            name: shapes[site] for name in HEAD_SITES if (site := Site(name, layer)) in shapes
        }
        gated = SITE_HOOKS["q_gate"].format(layer=layer) in model.hook_dict
        for name, layout in _of_layer(of_layer, n_heads, gated).items():
            layouts[Site(name, layer)] = layout
    return layouts


def _of_layer(
    shapes: dict[str, tuple[int, ...]], n_heads: int, gated: bool
) -> dict[str, HeadLayout | str | None]:
    """The layouts of one layer, from the shapes of its sites and the number of tokens in them.

    Queries and `z` have `n_heads` heads; keys are as wide as queries; values have the heads of the
    keys.
    """
    layouts: dict[str, HeadLayout | str | None] = {}
    heads: dict[str, int] = {}
    widths: dict[str, int] = {}
    for name, (n_tokens, *shape) in shapes.items():
        heads_first = len(shape) == 4 and shape[2] == n_tokens != shape[1]
        if len(shape) not in (3, 4) or (shape[1] != n_tokens and not heads_first):
            layouts[name] = f"is {shape} in a text of {n_tokens} tokens"
            continue
        total = torch.Size(shape).numel() // n_tokens
        shown = shape[1 if heads_first else 2] if len(shape) == 4 else 0
        if name in ("q", "z"):
            n = n_heads
        elif name == "k" and "q" in widths:
            n = total // widths["q"]
        else:
            n = heads.get("k", shown)
        parts = 2 * n if name == "q" and gated else n
        if not parts or total % parts or n_heads % n or (heads_first and shown != n):
            layouts[name] = f"is {shape} in a text of {n_tokens} tokens and {n_heads} heads"
            continue
        heads[name], widths[name] = n, total // parts
        as_here = shown == n and not heads_first
        layouts[name] = None if as_here else HeadLayout(n, heads_first, name == "q" and gated)
    return layouts


def _shapes(model: Any, n_tokens: int) -> dict[Site, tuple[int, ...]]:
    """Number of tokens and shape of every such activation in a pass over a few tokens."""
    points = model.hook_dict
    shapes: dict[Site, tuple[int, ...]] = {}

    def note(site: Site) -> Callable[..., None]:
        def hook(activation: Tensor, hook: Any = None) -> None:
            shapes[site] = (n_tokens, *activation.shape)

        return hook

    hooks = [
        (str(points[name].name), note(Site(site, layer)))
        for layer in range(int(model.cfg.n_layers))
        for site in HEAD_SITES
        if (name := SITE_HOOKS[site].format(layer=layer)) in points
    ]
    tokens = (torch.arange(n_tokens) % int(model.cfg.d_vocab))[None]
    with torch.no_grad(), hooks_aside(model):
        model.run_with_hooks(tokens.to(input_device(model)), fwd_hooks=hooks, return_type=None)
    return shapes
