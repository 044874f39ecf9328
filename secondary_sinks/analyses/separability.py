"""From which layer on can a future sink be told from a token that will not become one?

Vectors of tokens at every layer up to the onset, of three kinds: *future sinks*, the *same token
id* where it will not become a sink, and *ordinary* tokens nearby. Two contrasts are asked, future
sinks against each of the others; the first is the sharper one, since any layer can tell "," from
"river". Each is answered three times:

* **probe**: logistic regression on standardized vectors, trained on some texts and tested on
  others, so that no text is on both sides. The area under the curve (AUC) is the mean over test
  folds, and is compared with what the same procedure gives when labels are shuffled within each
  text;
* **clusters**: does k-means with k = 2, which knows no labels, find the two kinds? The adjusted
  Rand index is 1 if it does and 0 by chance;
* **silhouette** of the two kinds: 1 for tight and far apart, 0 for intermingled.

`position_auc` is what a token's position alone would tell: sinks stand early in many texts, and a
vector that betrays its position betrays them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import UserHook
from secondary_sinks.host.sites import Site, missing_sites
from secondary_sinks.host.text_input import Text
from secondary_sinks.observe.collectors import ChosenVectors
from secondary_sinks.observe.trace import Trace, trace
from secondary_sinks.result import Result
from secondary_sinks.sinks.corpus import distinct_sinks, repeats_note, shared_by
from secondary_sinks.sinks.selection import sink_maps_of
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out")

"""Where vectors are read, in the order of the block."""

POOL = 4

"""Ordinary tokens are drawn from this many times as many that are nearest in position."""

TELLING_POSITION = 0.8

"""AUC of the position alone from which on a reader is told."""

_SPOKEN = {"same_token": "the same token", "ordinary": "ordinary tokens"}

Embedding = Literal["pca", "tsne"]

ContrastName = Literal["same_token", "ordinary"]

CONTRASTS: tuple[ContrastName, ...] = ("same_token", "ordinary")

SINK, SAME_TOKEN, ORDINARY = 0, 1, 2

"""Kinds of tokens, as in `Separability.kind`."""

INVERSE_PENALTY = 10.0

"""scikit-learn's C of the probe, times the dimensions: the squared length of a standardized vector
is their number, so that the penalty means the same in every model."""

_COLUMNS = (
    "auc", "balanced_accuracy", "chance_auc", "chance_high", "p_value", "rand", "silhouette",
)  # fmt: skip


def separability(
    model: Any,
    maps_or_texts: Text | SinkMap | Sequence[SinkMap],
    *,
    onset: int | None = None,
    n_controls: int = 4,
    n_permutations: int = 20,
    n_splits: int = 5,
    embedding: Embedding = "pca",
    seed: int = 0,
    chat: bool = False,
    fwd_hooks: Sequence[UserHook] = (),
) -> Separability:
    """Tell future sinks from other tokens, at every layer up to the onset.

    Vectors of the residual before the block and between its halves, of the attention's output and
    of the MLP's, of the future sinks of one onset, of the same token ids where they are no sinks
    (those whose positions are most like the sinks'), and of ordinary tokens nearby.
    `analyses.separability` tells what is asked of them. No vector is used twice: what texts share at
    their beginning belongs to the first.

    What it is not evidence for: that the model uses what a probe finds, nor, at early layers, that
    it is the feature which the writer reads; a position or the token before can be told as well
    (see `position_auc`). And at chance means: not by a linear probe from so few tokens.

    Args:
        model: any TransformerLens model.
        maps_or_texts: several texts (see `detect_sinks`), or their sink maps.
        onset: which sinks; by default those of the most common onset.
        n_controls: ordinary tokens for each sink, and at most as many of the same token id.
        n_permutations: shuffles of the labels; n of them cannot give a p-value below 1 / (n + 1).
        n_splits: folds of texts.
        embedding: "pca" or "tsne", for the picture.
        seed: of every random choice; recorded with the result.
        chat: strings go through the chat template.
        fwd_hooks: hooks of your own, in force in every pass.

    Raises:
        InputError: no secondary sinks of that onset, or a sink map of another model or criterion.
        ModelError: the model cannot be measured.
    """
    for name, value, least in (
        ("n_controls", n_controls, 1),
        ("n_permutations", n_permutations, 0),
        ("n_splits", n_splits, 2),
    ):
        if value < least:
            raise InputError(f"{name} is {value}; it must be {least} or more")
    if embedding not in get_args(Embedding):
        raise InputError(f"no embedding {embedding!r}; use 'pca' or 'tsne'")
    maps = sink_maps_of(model, maps_or_texts, chat=chat, fwd_hooks=fwd_hooks)
    onset = _onset(maps, onset)
    chosen = [list(tokens) for tokens in _choose(maps, onset, n_controls, seed)]
    missing = [site.name for site in missing_sites(model, [Site(site, 0) for site in SITES])]
    sites = [site for site in SITES if site not in missing]
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for one, tokens in zip(maps, chosen, strict=True):
        if tokens:
            collector = ChosenVectors([position for position, _ in tokens], sites)
            found = cast(
                Trace, trace(model, cast(Tensor, one.tokens), [collector], fwd_hooks=fwd_hooks)
            )
            for site in sites:
                parts[site].append(found["ChosenVectors"][site][: onset + 1])
    vectors = {site: torch.cat(part, dim=1) for site, part in parts.items()}
    text = torch.tensor([index for index, tokens in enumerate(chosen) for _ in tokens])
    position = torch.tensor([place for tokens in chosen for place, _ in tokens])
    kind = torch.tensor([own for tokens in chosen for _, own in tokens])
    contrasts = {
        name: contrast_of(
            vectors,
            kind,
            text,
            position,
            other,
            n_permutations=n_permutations,
            n_splits=n_splits,
            seed=seed,
        )
        for name, other in (("same_token", SAME_TOKEN), ("ordinary", ORDINARY))
    }
    n_sinks = int((kind == SINK).sum())
    return Separability(
        onset=onset,
        sites=tuple(sites),
        text=text,
        position=position,
        tokens=tuple(
            maps[index].token_strings[place]
            for index, tokens in enumerate(chosen)
            for place, _ in tokens
        ),
        kind=kind,
        embedding=embed(vectors, embedding, seed=seed),
        method=embedding,
        n_permutations=n_permutations,
        n_splits=n_splits,
        seed=seed,
        notes=(
            *repeats_note(maps, len(list(distinct_sinks(maps)))),
            *_notes(kind, text, n_sinks),
            *_position_notes(contrasts),
        ),
        model=maps[0].model,
        **contrasts,
    )


def _onset(maps: Sequence[SinkMap], onset: int | None) -> int:
    onsets = Counter(found.sink.l_start for found in distinct_sinks(maps))
    if onset is None:
        if not onsets:
            raise InputError(
                "no secondary sinks in these texts: see detect_sinks(...).margins() for the tokens "
                "that came nearest"
            )
        return max(onsets, key=lambda layer: (onsets[layer], -layer))
    if onset not in onsets:
        raise InputError(f"no secondary sinks of onset {onset}; there are some at {sorted(onsets)}")
    return onset


def _choose(
    maps: Sequence[SinkMap], onset: int, n_controls: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Of each text: positions with their kinds."""
    here = [found.sink for found in distinct_sinks(maps) if found.sink.l_start == onset]
    ids = {sink.token_id for sink in here}
    places = np.array([sink.position for sink in here])
    for index, (one, shared) in enumerate(zip(maps, shared_by(maps), strict=True)):
        rng = np.random.default_rng([seed, index])
        own = sorted({s.position for s in one.secondary if s.l_start == onset})
        own = [position for position in own if position >= shared]
        taken = {sink.position for sink in one.sinks} | {one.primary_position}
        free = [t for t in range(shared, one.n_tokens) if t not in taken]
        tokens = cast(Tensor, one.tokens).tolist()
        same = [t for t in free if tokens[t] in ids]
        others = [t for t in free if tokens[t] not in ids]
        # Texts without sinks still show the same tokens where they are none. Those at positions
        # like the sinks', or the probe would tell early from late.
        count = n_controls * max(1, len(own))
        kept = sorted(same, key=lambda t: int(np.abs(places - t).min()))[:count]
        drawn: set[int] = set()
        for position in own:
            near = sorted((t for t in others if t not in drawn), key=lambda t: abs(t - position))[
                : POOL * n_controls
            ]
            drawn |= set(rng.permutation(near)[:n_controls].astype(int).tolist())
        yield [
            *((position, SINK) for position in own),
            *((int(t), SAME_TOKEN) for t in sorted(kept)),
            *((int(t), ORDINARY) for t in sorted(drawn)),
        ]


def _notes(kind: Tensor, text: Tensor, n_sinks: int) -> tuple[str, ...]:
    notes = []
    for name, other in (("of the same token id", SAME_TOKEN), ("ordinary", ORDINARY)):
        texts = [len(set(text[kind == own].tolist())) for own in (SINK, other)]
        if min(texts) < 2:
            notes.append(
                f"no probe against tokens {name}: {n_sinks} sinks stand in {texts[0]} and the "
                f"others in {texts[1]} texts, and each kind must be in two at least; pass more "
                "texts that begin differently"
            )
    return tuple(notes)


def _position_notes(contrasts: Mapping[str, Contrast]) -> Iterator[str]:
    for name, found in contrasts.items():
        if found.position_auc >= TELLING_POSITION:
            yield (
                f"position alone tells sinks from {_SPOKEN[name]} with an AUC of "
                f"{found.position_auc:.2f}: a probe that does no better may have found the position"
            )


@dataclass(frozen=True)
class Contrast:
    """Future sinks against one other kind, at every site and layer; NaN where there are too few."""

    n_sinks: int
    n_others: int
    n_texts: int
    """Texts that hold tokens of both kinds or of one."""
    position_auc: float
    """AUC of the position alone, without training (0.5 to 1)."""
    auc: Float[Tensor, "site layer"]
    """Cross-validated AUC of the probe."""
    balanced_accuracy: Float[Tensor, "site layer"]
    """Cross-validated mean of the shares of both kinds that are told right."""
    chance_auc: Float[Tensor, "site layer"]
    """Mean AUC with shuffled labels."""
    chance_high: Float[Tensor, "site layer"]
    """95 % quantile of the AUC with shuffled labels."""
    p_value: Float[Tensor, "site layer"]
    """Share of shuffles, the true labels among them, with at least this AUC. Not corrected for the
    number of sites and layers."""
    rand: Float[Tensor, "site layer"]
    """Adjusted Rand index of two clusters and the two kinds."""
    silhouette: Float[Tensor, "site layer"]
    """Mean silhouette of the two kinds."""


@dataclass(frozen=True)
class Separability(Result):
    """How well future sinks can be told, by site and layer; see `separability`."""

    onset: int
    """Onset layer of the sinks; those of other onsets are left out."""
    sites: tuple[str, ...]
    text: Int[Tensor, "token"]
    """Index of the text of each token."""
    position: Int[Tensor, "token"]
    tokens: tuple[str, ...]
    kind: Int[Tensor, "token"]
    """0: future sink, 1: the same token id, no sink, 2: another ordinary token."""
    same_token: Contrast
    ordinary: Contrast
    embedding: Float[Tensor, "site layer token 2"]
    """Two dimensions of the vectors, for the eye."""
    method: Embedding
    """How the two dimensions were made."""
    n_permutations: int
    n_splits: int
    seed: int
    notes: tuple[str, ...]
    model: dict[str, Any]

    def contrast(self, name: ContrastName) -> Contrast:
        """Future sinks against "same_token" or "ordinary"."""
        found: Contrast = getattr(self, name)
        return found

    def first_layer(
        self, site: str, contrast: ContrastName = "same_token", *, level: float = 0.05
    ) -> int | None:
        """First layer from which on, up to the onset, the probe beats shuffled labels at `level`.

        None if it does not at the onset itself.
        """
        good = self.contrast(contrast).p_value[self.sites.index(site)] <= level
        bad = (~good).nonzero().flatten().tolist()
        first = bad[-1] + 1 if bad else 0
        return first if first <= self.onset else None

    def __repr__(self) -> str:
        first = ", ".join(
            f"{site} {'never' if (layer := self.first_layer(site)) is None else layer}"
            for site in self.sites
        )
        return (
            f"Separability({self.model.get('name', '?')!r}, {self.same_token.n_sinks} sinks of "
            f"onset {self.onset}; told from the same token from layer: {first})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each contrast, site and layer."""
        import pandas as pd

        rows = []
        for name in CONTRASTS:
            found = self.contrast(name)
            for number, site in enumerate(self.sites):
                for layer in range(self.onset + 1):
                    row: dict[str, Any] = {"contrast": name, "site": site, "layer": layer}
                    for column in _COLUMNS:
                        row[column] = float(getattr(found, column)[number, layer])
                    rows.append(row)
        return pd.DataFrame(rows)


def contrast_of(
    vectors: Mapping[str, Float[Tensor, "layer token d_model"]],
    kind: Int[Tensor, "token"],
    text: Int[Tensor, "token"],
    position: Int[Tensor, "token"],
    other: int,
    *,
    n_permutations: int,
    n_splits: int,
    seed: int,
) -> Contrast:
    """Ask all three questions of the future sinks and the tokens of kind `other`."""
    kept = (kind == SINK) | (kind == other)
    label, groups = (kind[kept] == SINK).numpy(), text[kept].numpy()
    n_layers = next(iter(vectors.values())).shape[0]
    tables = {name: torch.full((len(vectors), n_layers), torch.nan) for name in _COLUMNS}
    n_sinks = int(label.sum())
    for number, values in enumerate(vectors.values()):
        for layer in range(n_layers):
            x = values[layer, kept].double().numpy()
            found = probe(
                x, label, groups, n_permutations=n_permutations, n_splits=n_splits, seed=seed
            )
            found |= _clusters(x, label, seed=seed)
            for name, value in found.items():
                tables[name][number, layer] = value
    return Contrast(
        n_sinks=n_sinks,
        n_others=len(label) - n_sinks,
        n_texts=len(set(groups.tolist())),
        position_auc=_auc_of(position[kept].numpy(), label),
        **tables,
    )


def probe(
    x: Any, label: Any, groups: Any, *, n_permutations: int = 20, n_splits: int = 5, seed: int = 0
) -> dict[str, float]:
    """Cross-validated logistic regression with its chance level; NaN with fewer than two texts of
    each kind.

    Args:
        x: vectors [token, d_model].
        label: which are future sinks.
        groups: text of each token; no text is in both training and test.
        n_permutations: how often labels are shuffled, within each text.
        n_splits: number of folds, at most the number of texts with sinks and with others.
        seed: of the folds and of the shuffles.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    texts = [set(groups[label == one].tolist()) for one in (True, False)]
    n_folds = min(n_splits, *map(len, texts))
    if n_folds < 2:
        return dict.fromkeys(_COLUMNS[:5], math.nan)
    folds = list(
        StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed).split(x, label, groups)
    )
    prepared = [(_reduced(x, train), train, test) for train, test in folds]
    strength = INVERSE_PENALTY / x.shape[1]
    auc, accuracy = _validated(prepared, label, strength)
    rng = np.random.default_rng(seed)
    shuffled = [
        _validated(prepared, _shuffled(label, groups, rng), strength)[0]
        for _ in range(n_permutations)
    ]
    chance = np.array([value for value in shuffled if not math.isnan(value)])
    known = len(chance) > 0 and not math.isnan(auc)
    return {
        "auc": auc,
        "balanced_accuracy": accuracy,
        "chance_auc": float(chance.mean()) if known else math.nan,
        "chance_high": float(np.quantile(chance, 0.95)) if known else math.nan,
        "p_value": (1 + int((chance >= auc).sum())) / (1 + len(chance)) if known else math.nan,
    }


def _reduced(x: Any, train: Any) -> Any:
    """All vectors standardized by the training ones, in the space that those span.

    A penalty on the squared weights leaves nothing outside that space, so the regression is the
    same as on all dimensions, at a fraction of the time.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x[train])
    scaled = scaler.transform(x)
    _, size, axes = np.linalg.svd(scaled[train], full_matrices=False)
    return scaled @ axes[size > 1e-9 * max(float(size.max(initial=0.0)), 1e-30)].T


def _validated(
    prepared: Sequence[tuple[Any, Any, Any]], label: Any, strength: float
) -> tuple[float, float]:
    """AUC (mean over folds) and balanced accuracy (over all predictions)."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    areas, told, true = [], [], []
    for x, train, test in prepared:
        if len(set(label[train].tolist())) < 2:
            continue
        # Vectors that are the same but for rounding must not be ranked by it.
        decided = np.round(_fitted(x[train], label[train], strength)(x[test]), 8)
        told.append(decided > 0)
        true.append(label[test])
        if len(set(label[test].tolist())) == 2:
            areas.append(float(roc_auc_score(label[test], decided)))
    if not areas:
        return math.nan, math.nan
    accuracy = balanced_accuracy_score(np.concatenate(true), np.concatenate(told))
    return float(np.mean(areas)), float(accuracy)


def _fitted(x: Any, label: Any, strength: float) -> Callable[[Any], Any]:
    """The decision function of the regression."""
    from sklearn.linear_model import LogisticRegression

    if x.shape[1] == 0:  # all vectors are the same: the embeddings of one token are
        return lambda tested: np.zeros(len(tested))
    # Of the solvers the fastest where there are more dimensions than tokens.
    model = LogisticRegression(
        C=strength,
        solver="liblinear",
        dual=True,
        class_weight="balanced",
        max_iter=2000,
        random_state=0,
    )
    decide: Callable[[Any], Any] = model.fit(x, label).decision_function
    return decide


def _shuffled(label: Any, groups: Any, rng: np.random.Generator) -> Any:
    """Labels shuffled within each text, which keeps how many of each kind a text has."""
    moved = label.copy()
    for text in np.unique(groups):
        own = np.flatnonzero(groups == text)
        moved[own] = label[rng.permutation(own)]
    return moved


def _clusters(x: Any, label: Any, *, seed: int) -> dict[str, float]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    n_sinks = int(label.sum())
    if min(n_sinks, len(label) - n_sinks) < 2 or len(np.unique(x, axis=0)) < 2:
        return {"rand": math.nan, "silhouette": math.nan}
    found = KMeans(2, n_init=5, random_state=seed).fit_predict(x)
    return {
        "rand": float(adjusted_rand_score(label, found)),
        "silhouette": float(silhouette_score(x, label)),
    }


def _auc_of(values: Any, label: Any) -> float:
    from sklearn.metrics import roc_auc_score

    if len(set(label.tolist())) < 2:
        return math.nan
    area = float(roc_auc_score(label, values))
    return max(area, 1 - area)


def embed(
    vectors: Mapping[str, Float[Tensor, "layer token d_model"]], method: Embedding, *, seed: int
) -> Float[Tensor, "site layer token 2"]:
    """Two dimensions of the vectors of each site and layer."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = []
    for values in vectors.values():
        for layer in values.double().numpy():
            if method == "tsne":
                perplexity = min(30.0, max(1.0, (len(layer) - 1) / 3))
                model: Any = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
            else:
                model = PCA(2, random_state=seed)
            rows.append(torch.from_numpy(np.ascontiguousarray(model.fit_transform(layer))).float())
    n_layers, n_tokens, _ = next(iter(vectors.values())).shape
    return torch.stack(rows).reshape(len(vectors), n_layers, n_tokens, 2)
