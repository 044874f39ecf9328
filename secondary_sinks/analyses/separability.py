"""From which layer on is a future sink separable from a token that will not become one?

Vectors of tokens at every layer up to the onset, of three kinds: *future sinks*, the *same token*
(its id) where it does not become a sink, and *ordinary* tokens nearby. Future sinks are contrasted
with each of the others; the contrast with the same token is the sharper one, since any layer can
tell "," from "river". Each contrast has three measures:

* **probe**: logistic regression on standardized vectors, trained on some texts and tested on
  others, so that no text is on both sides. The area under the curve (AUC) is the mean over test
  folds, and is compared with what the same procedure gives when labels are shuffled within each
  text;
* **clusters**: does k-means with k = 2, which knows no labels, recover the two kinds? The adjusted
  Rand index is 1 if it does and 0 by chance;
* **silhouette** of the two kinds: 1 for tight and far apart, 0 for intermingled.

`position_auc` is the AUC of a token's position alone: sinks stand early in many texts, and a vector
that reveals its position separates them too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secondary_sinks.errors import InputError
from secondary_sinks.host.protocol import Model, UserHook
from secondary_sinks.host.provenance import Provenance
from secondary_sinks.host.sites import Site, missing_sites
from secondary_sinks.observe.collectors import ChosenVectors
from secondary_sinks.observe.trace import trace_tokens
from secondary_sinks.result import Result, counted
from secondary_sinks.sinks.controls import matched_controls, nearest_same_tokens
from secondary_sinks.sinks.distinct_sinks import (
    TextSink,
    distinct_sinks,
    repeats_note,
    shared_beginnings,
)
from secondary_sinks.sinks.selection import check_maps
from secondary_sinks.sinks.sink_map import SinkMap

if TYPE_CHECKING:
    import pandas as pd

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out")
"""Where vectors are read, in the order of the block."""

TELLING_POSITION = 0.8
"""A note warns the reader if the position alone has this AUC or more."""

INVERSE_PENALTY = 10.0
"""scikit-learn's C of the probe, times the dimensions: the squared length of a standardized vector
is their number, so that the penalty means the same in every model."""

Embedding = Literal["pca", "tsne"]

ContrastName = Literal["same_token", "ordinary"]

CONTRASTS: tuple[ContrastName, ...] = ("same_token", "ordinary")

SINK, SAME_TOKEN, ORDINARY = 0, 1, 2
"""Kinds of tokens, as in `Separability.kind`."""

_OTHERS: dict[ContrastName, tuple[int, str]] = {
    "same_token": (SAME_TOKEN, "the same token"),
    "ordinary": (ORDINARY, "ordinary tokens"),
}

_COLUMNS = (
    "auc", "balanced_accuracy", "chance_auc", "chance_high", "p_value", "rand", "silhouette",
)  # fmt: skip


def separability(
    model: Model,
    sink_maps: SinkMap | Sequence[SinkMap],
    *,
    onset: int | None = None,
    n_controls: int = 4,
    n_permutations: int = 20,
    n_splits: int = 5,
    embedding: Embedding = "pca",
    seed: int = 0,
    fwd_hooks: Sequence[UserHook] = (),
) -> Separability:
    """From which layer on is a future secondary sink separable from other tokens?

    Compares vectors of the residual before the block and between its halves, of the attention's
    output and of the MLP's, at every layer up to the onset: those of the future sinks of one onset,
    of the same token ids where they are not sinks (at positions most like the sinks'), and of
    matched ordinary tokens (`sinks.controls`). The module says how they are compared. No vector is
    used twice: what texts share at their beginning belongs to the first.

    >>> result = ss.separability(model, ss.detect_sinks(model, texts), seed=0)
    >>> result.first_layer("resid_pre")
    >>> result.plot()

    Not evidence for: that the model uses what a probe finds, nor, at early layers, that it is the
    feature which the writer reads; a probe may also use the position or the token before (see
    `position_auc`). And an AUC at chance means: not separable by a linear probe from so few tokens.

    Args:
        model: any TransformerLens model.
        sink_maps: the maps of several texts, from `detect_sinks` in this model.
        onset: which secondary sinks; by default those of the most common onset.
        n_controls: ordinary tokens for each sink, and at most as many of the same token id.
        n_permutations: shuffles of the labels; n of them cannot give a p-value below 1 / (n + 1).
        n_splits: folds of texts.
        embedding: "pca" or "tsne", for the picture.
        seed: of every random choice.
        fwd_hooks: the hooks with which the maps were made, in force here as well.

    Raises:
        InputError: no secondary sinks of that onset, or a map that does not belong to this model.
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
    several = check_maps(model, sink_maps, fwd_hooks=fwd_hooks)
    future_sinks = _of_onset(distinct_sinks(several), onset)
    onset = future_sinks[0].sink.l_start
    chosen = list(_choose_tokens(several, future_sinks, n_controls, seed))
    missing = {site.name for site in missing_sites(model, [Site(site, 0) for site in SITES])}
    sites = tuple(site for site in SITES if site not in missing)
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for sink_map, tokens in zip(several, chosen, strict=True):
        if tokens:
            collector = ChosenVectors([position for position, _ in tokens], sites)
            ids = sink_map.array("tokens")
            result = trace_tokens(model, ids, [collector], fwd_hooks=fwd_hooks)
            for site in sites:
                parts[site].append(result["ChosenVectors"][site][: onset + 1])
    vectors = {site: torch.cat(part, dim=1) for site, part in parts.items()}
    rows = [(text, *token) for text, tokens in enumerate(chosen) for token in tokens]
    text, position, kind = torch.tensor(rows).T
    contrasts: dict[ContrastName, Contrast] = {
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
        for name, (other, _) in _OTHERS.items()
    }
    return Separability(
        onset=onset,
        sites=sites,
        text=text,
        position=position,
        tokens=tuple(several[index].token_strings[place] for index, place, _ in rows),
        kind=kind,
        embedding=embed(vectors, embedding, seed=seed),
        method=embedding,
        n_permutations=n_permutations,
        n_splits=n_splits,
        notes=(*repeats_note(several), *_notes(kind, text), *_position_notes(contrasts)),
        provenance=several[0].provenance.extended(seed=seed),
        **contrasts,
    )


def _of_onset(sinks: Sequence[TextSink], onset: int | None) -> list[TextSink]:
    """The sinks of one onset, by default the most common (the earliest of several)."""
    counts = Counter(sink.l_start for _, sink in sinks)
    if not counts:
        raise InputError(
            "no secondary sinks in these texts: see margins() of their sink maps for the tokens "
            "that came nearest"
        )
    if onset is None:
        onset = max(counts, key=lambda layer: (counts[layer], -layer))
    if onset not in counts:
        raise InputError(f"no secondary sinks of onset {onset}; there are some at {sorted(counts)}")
    return [entry for entry in sinks if entry.sink.l_start == onset]


def _choose_tokens(
    sink_maps: Sequence[SinkMap], future_sinks: Sequence[TextSink], n_controls: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Of each text: positions with their kinds."""
    every_sink = [sink for _, sink in future_sinks]
    ids = torch.tensor(sorted({sink.token_id for sink in every_sink}))
    for text, (sink_map, n_shared) in enumerate(
        zip(sink_maps, shared_beginnings(sink_maps), strict=True)
    ):
        here = {sink.position: sink for index, sink in future_sinks if index == text}
        # Texts without sinks still show the same tokens where they are not sinks.
        count = n_controls * max(1, len(here))
        same = nearest_same_tokens(sink_map, every_sink, count, exclude=range(n_shared))
        same_ids = torch.isin(sink_map.array("tokens"), ids).nonzero().flatten().tolist()
        taken = {*range(n_shared), *same_ids}
        ordinary: list[int] = []
        for sink in here.values():
            exclude = taken.union(ordinary)
            ordinary += matched_controls(
                sink_map, sink, n_controls, seed=[seed, text], exclude=exclude
            )
        kinds = ((sorted(here), SINK), (same, SAME_TOKEN), (sorted(ordinary), ORDINARY))
        yield [(place, kind) for places, kind in kinds for place in places]


def _notes(kind: Tensor, text: Tensor) -> Iterator[str]:
    n_sinks = int((kind == SINK).sum())
    for other, name in _OTHERS.values():
        texts = [len(set(text[kind == group].tolist())) for group in (SINK, other)]
        if min(texts) < 2:
            yield (
                f"no probe against {name}: {counted(n_sinks, 'sink')} in "
                f"{counted(texts[0], 'text')}, the others in {counted(texts[1], 'text')}, and each "
                "kind must be in two at least; pass more texts that begin differently"
            )


def _position_notes(contrasts: Mapping[ContrastName, Contrast]) -> Iterator[str]:
    for name, contrast in contrasts.items():
        if contrast.position_auc >= TELLING_POSITION:
            yield (
                f"position alone separates sinks from {_OTHERS[name][1]} with an AUC of "
                f"{contrast.position_auc:.2f}: a probe that does no better may use the position"
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
    auc: Float[Tensor, " site layer"]
    """Cross-validated AUC of the probe."""
    balanced_accuracy: Float[Tensor, " site layer"]
    """Cross-validated mean of the shares of both kinds that are classified right."""
    chance_auc: Float[Tensor, " site layer"]
    """Mean AUC with shuffled labels."""
    chance_high: Float[Tensor, " site layer"]
    """95 % quantile of the AUC with shuffled labels."""
    p_value: Float[Tensor, " site layer"]
    """Share of shuffles, the true labels among them, with at least this AUC. Not corrected for the
    number of sites and layers."""
    rand: Float[Tensor, " site layer"]
    """Adjusted Rand index of two clusters and the two kinds."""
    silhouette: Float[Tensor, " site layer"]
    """Mean silhouette of the two kinds."""


@dataclass(frozen=True)
class Separability(Result):
    """How separable future sinks are, by site and layer; see `separability`."""

    onset: int
    """Onset layer of the sinks; those of other onsets are left out."""
    sites: tuple[str, ...]
    text: Int[Tensor, " token"]
    """Index of the text of each token."""
    position: Int[Tensor, " token"]
    tokens: tuple[str, ...]
    kind: Int[Tensor, " token"]
    """0: future sink, 1: the same token id, not a sink, 2: another ordinary token."""
    same_token: Contrast
    ordinary: Contrast
    embedding: Float[Tensor, " site layer token 2"]
    """Two dimensions of the vectors, for the eye."""
    method: Embedding
    """How the two dimensions were made."""
    n_permutations: int
    n_splits: int
    notes: tuple[str, ...]
    provenance: Provenance
    """Of the first text, with the seed."""

    def contrast(self, name: ContrastName) -> Contrast:
        """Future sinks against "same_token" or "ordinary"."""
        return cast(Contrast, getattr(self, name))

    def first_layer(
        self, site: str, contrast: ContrastName = "same_token", *, level: float = 0.05
    ) -> int | None:
        """First layer from which on, up to the onset, the probe beats shuffled labels at `level`.

        None if it does not at the onset itself.
        """
        significant = self.contrast(contrast).p_value[self.sites.index(site)] <= level
        others = (~significant).nonzero().flatten().tolist()
        first = others[-1] + 1 if others else 0
        return first if first <= self.onset else None

    def __repr__(self) -> str:
        first = ", ".join(
            f"{site} {'never' if (layer := self.first_layer(site)) is None else layer}"
            for site in self.sites
        )
        return (
            f"Separability({self.provenance.model.name!r}, "
            f"{counted(self.same_token.n_sinks, 'sink')} of onset {self.onset}; separable from the "
            f"same token from layer: {first})"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each contrast, site and layer."""
        import pandas as pd

        return pd.DataFrame(
            {"contrast": name, "site": site, "layer": layer}
            | {
                column: float(getattr(self.contrast(name), column)[number, layer])
                for column in _COLUMNS
            }
            for name in CONTRASTS
            for number, site in enumerate(self.sites)
            for layer in range(self.onset + 1)
        )


def contrast_of(
    vectors: Mapping[str, Float[Tensor, " layer token d_model"]],
    kind: Int[Tensor, " token"],
    text: Int[Tensor, " token"],
    position: Int[Tensor, " token"],
    other: int,
    *,
    n_permutations: int,
    n_splits: int,
    seed: int,
) -> Contrast:
    """Take all three measures of the future sinks and the tokens of kind `other`."""
    compared = (kind == SINK) | (kind == other)
    label, groups = (kind[compared] == SINK).numpy(), text[compared].numpy()
    n_layers = next(iter(vectors.values())).shape[0]
    tables = {name: torch.full((len(vectors), n_layers), torch.nan) for name in _COLUMNS}
    n_sinks = int(label.sum())
    position_auc = _auc(position[compared].numpy(), label)
    for number, values in enumerate(vectors.values()):
        for layer in range(n_layers):
            x = values[layer, compared].double().numpy()
            measures = probe(
                x, label, groups, n_permutations=n_permutations, n_splits=n_splits, seed=seed
            )
            measures |= _clusters(x, label, seed=seed)
            for name, value in measures.items():
                tables[name][number, layer] = value
    return Contrast(
        n_sinks=n_sinks,
        n_others=len(label) - n_sinks,
        n_texts=len(set(groups.tolist())),
        position_auc=max(position_auc, 1 - position_auc),
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
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold

    texts = [set(groups[label == side].tolist()) for side in (True, False)]
    n_folds = min(n_splits, *map(len, texts))
    if n_folds < 2:
        return dict.fromkeys(_COLUMNS[:5], math.nan)
    folds = list(
        StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed).split(x, label, groups)
    )
    prepared = [(_reduced(x, train), train, test) for train, test in folds]
    strength = INVERSE_PENALTY / x.shape[1]
    predictions = _predictions(prepared, label, strength)
    auc, accuracy = _mean_auc(predictions), math.nan
    if not math.isnan(auc):
        true, values = (np.concatenate(parts) for parts in zip(*predictions, strict=True))
        accuracy = float(balanced_accuracy_score(true, values > 0))
    rng = np.random.default_rng(seed)
    shuffled = [
        _mean_auc(_predictions(prepared, _shuffled(label, groups, rng), strength))
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

    A penalty on the squared weights sets those outside that space to zero, so the regression is the
    same as on all dimensions, in a fraction of the time.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x[train])
    scaled = np.asarray(scaler.transform(x))
    _, size, axes = np.linalg.svd(scaled[train], full_matrices=False)
    return scaled @ axes[size > 1e-9 * max(float(size.max(initial=0.0)), 1e-30)].T


def _predictions(
    prepared: Sequence[tuple[Any, Any, Any]], label: Any, strength: float
) -> list[tuple[Any, Any]]:
    """Of each fold: true labels and the probe's decision values of the tested tokens."""
    predictions = []
    for x, train, test in prepared:
        if len(set(label[train].tolist())) == 2:
            # Vectors that differ by rounding alone must not be ranked by it.
            decision = np.round(_decision(x, label, train, strength)[test], 8)
            predictions.append((label[test], decision))
    return predictions


def _decision(x: Any, label: Any, train: Any, strength: float) -> Any:
    """Decision values of all tokens, by a regression that weighs both kinds alike."""
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    if x.shape[1] == 0:  # all vectors are the same: the embeddings of one token are
        return np.zeros(len(x))
    weight = np.where(label, 1 / label[train].sum(), 1 / (~label[train]).sum()) * len(train) / 2
    # liblinear's dual is the fastest solver where there are more dimensions than tokens.
    model = LogisticRegression(
        C=strength, solver="liblinear", dual=True, max_iter=2000, random_state=0
    )
    with config_context(assume_finite=True, skip_parameter_validation=True):
        return model.fit(x[train], label[train], weight[train]).decision_function(x)


def _mean_auc(predictions: Sequence[tuple[Any, Any]]) -> float:
    areas = [_auc(values, label) for label, values in predictions]
    known = [area for area in areas if not math.isnan(area)]
    return float(np.mean(known)) if known else math.nan


def _auc(values: Any, label: Any) -> float:
    """Area under the ROC curve: the share of pairs that are ranked right, ties counted half. From
    ranks, since scikit-learn's function spends most of its time on checks; NaN for one kind."""
    from scipy.stats import rankdata

    n_true, n_false = int(label.sum()), int((~label).sum())
    if not n_true or not n_false:
        return math.nan
    ranks = float(rankdata(values)[label].sum())
    return (ranks - n_true * (n_true + 1) / 2) / (n_true * n_false)


def _shuffled(label: Any, groups: Any, rng: np.random.Generator) -> Any:
    """Labels shuffled within each text, which keeps how many of each kind a text has."""
    shuffled = label.copy()
    for text in np.unique(groups):
        members = np.flatnonzero(groups == text)
        shuffled[members] = label[rng.permutation(members)]
    return shuffled


def _clusters(x: Any, label: Any, *, seed: int) -> dict[str, float]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    n_sinks = int(label.sum())
    if min(n_sinks, len(label) - n_sinks) < 2 or len(np.unique(x, axis=0)) < 2:
        return {"rand": math.nan, "silhouette": math.nan}
    clusters = KMeans(2, n_init=5, random_state=seed).fit_predict(x)  # pyright: ignore[reportArgumentType]
    return {
        "rand": float(adjusted_rand_score(label, clusters)),
        "silhouette": float(silhouette_score(x, label)),
    }


def embed(
    vectors: Mapping[str, Float[Tensor, " layer token d_model"]], method: Embedding, *, seed: int
) -> Float[Tensor, " site layer token 2"]:
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
