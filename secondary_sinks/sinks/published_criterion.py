"""The published detector (arXiv 2512.22213), reproduced exactly, for comparison.

It reads hidden states as Hugging Face reports them (the last one after the final norm) and tests
alignment alone:

1. the primary is the candidate position (0, 1, 2 in a chat template, else 0, 1) with the largest
   mean norm over layers;
2. its layers begin after the largest rise of its norm and end before the largest fall after that;
3. within those layers, every later token with |cos| > 0.9 to the primary is a sink in that layer;
4. a token that is a sink in n of L layers is `secondary` if 4 < n < L - 15, `bos_sink` if
   n >= L - 15, and `noise` otherwise. Here `bos_sink` is called "primary".

Known to fail where L is small (with 24 layers a secondary sink that lives 17 is called a BOS sink),
where all tokens share a large component (nearly all pass), and where the primary has two phases
(it sees only the phase after the larger rise). Layers need not be contiguous, and the sign of the
cosine is ignored.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from secondary_sinks.sinks.attention_baseline import AttentionBaseline
from secondary_sinks.sinks.criterion import life_mean
from secondary_sinks.sinks.measurements import Measurements
from secondary_sinks.sinks.primary import Detection
from secondary_sinks.sinks.sink import MIN_COSINE, Evidence, Sink, kind_by_lifetime

CHAT_CANDIDATES = (0, 1, 2)
PLAIN_CANDIDATES = (0, 1)


def detect(measured: Measurements, *, chat: bool, primary: int | None = None) -> Detection:
    """Find the sinks of one text by the published rule.

    Args:
        measured: residuals (with the final norm in the last layer) and attention of the text.
        chat: whether the tokens came out of a chat template.
        primary: position of the primary sink; by default the published choice.
    """
    geometry, score = measured.geometry, measured.score
    allowed = (primary,) if primary is not None else CHAT_CANDIDATES if chat else PLAIN_CANDIDATES
    rows = [row for row, p in enumerate(geometry.candidates) if p in allowed]
    means = geometry.norm.mean(dim=0)[[geometry.candidates[row] for row in rows]]
    index = rows[int(means.argmax())]
    position = geometry.candidates[index]
    start, end = clip_layers(geometry.norm[:, position])
    cosine = geometry.alignment[index]
    aligned = cosine.abs() > MIN_COSINE
    aligned[:, : position + 1] = False
    aligned[:, position] = True
    aligned[:start] = False
    aligned[end:] = False
    n_layers = cosine.shape[0]
    baseline = AttentionBaseline.of(
        score, position, examples=~aligned.any(dim=0), visible=measured.visible, min_queries=8
    )
    attention = baseline.ratio(score)
    strength = baseline.strength(score)
    ratio = geometry.norm / geometry.background_norm[:, None]
    centered_ratio = geometry.centered_norm / geometry.background_centered_norm[:, None]
    head_mean = score.mean(dim=1)
    sinks = []
    for token in aligned.any(dim=0).nonzero().flatten().tolist():
        layers = tuple(aligned[:, token].nonzero().flatten().tolist())
        kind = kind_by_lifetime(len(layers), n_layers)
        after = [
            float(head_mean[layer + 1, token]) if layer + 1 < n_layers else math.nan
            for layer in layers
        ]
        evidence = Evidence(
            alignment=tuple(cosine[list(layers), token].tolist()),
            centered_alignment=tuple(
                geometry.centered_alignment[index, list(layers), token].tolist()
            ),
            norm=tuple(geometry.norm[list(layers), token].tolist()),
            norm_ratio=tuple(ratio[list(layers), token].tolist()),
            centered_norm_ratio=tuple(centered_ratio[list(layers), token].tolist()),
            sink_score=tuple(after),
            attention_ratio=life_mean(attention[:, token], layers, baseline.has_attention),
            strength=life_mean(strength[:, token], layers, baseline.has_attention),
            n_queries=measured.n_tokens - 1 - token,
            delay=layers[0] - start,
            published_kind=kind,
        )
        sinks.append(
            Sink(
                token,
                measured.token_strings[token],
                measured.tokens[token],
                kind,
                layers,
                evidence,
            )
        )
    # As published records list them: the primary first, then by layer and position.
    sinks.sort(key=lambda sink: (sink.position != position, sink.l_start, sink.position))
    return Detection(
        primary=index,
        phases=((start, end),),
        sinks=tuple(sinks),
        attention_ratio=attention,
        strength=strength,
    )


def clip_layers(norm: Float[Tensor, " layer"]) -> tuple[int, int]:
    """Layers [start, end) between the largest rise of `norm` and the largest fall after it.

    Where the largest rise is the last step, no fall can follow (the published code fails there),
    and the run goes to the end.
    """
    steps = norm[1:] - norm[:-1]
    if len(steps) == 0:
        return 0, len(norm)
    start = int(steps.argmax()) + 1
    if start == len(steps):
        return start, len(norm)
    return start, int(steps[start:].argmin()) + start + 1
