"""What each tensor at each type would cost in quality: distortion (of the weights) times sensitivity (measured).

Errors of different tensors are independent, so that to second order their KL divergences add up, and that of one tensor
is proportional to its squared error. Measured, there is a floor besides: disturb a tensor however little, and all that
is computed after it rounds otherwise. It is the same at every type, and no choice between types has a part in it.

Every chunk of the text counts alike, however strange it is to the model: one in a language that the model hardly knows
can diverge a hundred times as much as another, and would decide alone. So a chunk's divergences are divided by its own
total, and the loss of a recipe stands for the harmonic mean of the chunks' divergences. Pure numbers.
"""

from collections.abc import Iterable, Mapping, Sequence

from quant.choosing.distortion import Distortion
from quant.choosing.sensitivity import Measurement
from quant.recipes import TensorSpec
from runtime.ggml import GgmlType

Losses = Mapping[str, Mapping[GgmlType, float]]
"""Tensor name → type → what it costs: nats a token where it was measured, else in units of its own."""


def relative_losses(distortions: Mapping[str, Distortion]) -> Losses:
    """The squared error of what a tensor gives, as a part of what it gives."""
    return {
        name: {type_: distortion.relative(type_) for type_ in distortion.errors}
        for name, distortion in distortions.items()
    }


def proxy_losses(distortions: Mapping[str, Distortion], specs: Sequence[TensorSpec]) -> Losses:
    """Without any measuring: relative errors, followed to the residual stream.

    What attention and the feed-forward network add to the stream is a part of all that is in it by then, and an error
    of theirs is the same part of an error of the stream. The importance matrix says how much they add: the energies of
    attn_output and ffn_down. A tensor before these has its error passed on through them. That is less than whole for
    ffn_up and for attn_q: halves, which agree with what was measured on the demo model.
    """
    rows = {spec.name: spec.rows for spec in specs}
    relative = relative_losses(distortions)
    embedding = distortions.get("token_embd.weight")
    stream = embedding.energy / rows["token_embd.weight"] if embedding is not None else 0.0
    share: dict[str, float] = {}
    for layer in range(sum(name.endswith(".attn_output.weight") for name in distortions)):
        for writer, writers in _WRITERS.items():
            energy = distortions[f"blk.{layer}.{writer}.weight"].energy
            stream += energy
            for kind, part in writers.items():
                share[f"blk.{layer}.{kind}.weight"] = part * energy / stream if stream > 0 else 0.0
    return {name: {type_: share.get(name, 1.0) * loss for type_, loss in its.items()} for name, its in relative.items()}


_WRITERS = {
    "attn_output": {"attn_q": 0.5, "attn_k": 1.0, "attn_v": 1.0, "attn_output": 1.0},
    "ffn_down": {"ffn_gate": 1.0, "ffn_up": 0.5, "ffn_down": 1.0},
}
"""What is added to the residual stream, in order → the tensors whose errors get there through it, and which part."""


def measured_losses(distortions: Mapping[str, Distortion], measurements: Iterable[Measurement]) -> Losses:
    """Losses in nats a token. Every tensor must be measured, alone or with others, at one type or more."""
    measurements = tuple(measurements)
    weights = chunk_weights(measurements)
    proxy = relative_losses(distortions)
    found: dict[tuple[str, ...], list[Measurement]] = {}
    for measurement in measurements:
        found.setdefault(measurement.tensors, []).append(measurement)
    losses: dict[str, Mapping[GgmlType, float]] = {}
    for names, its in found.items():
        errors = [sum(proxy[name][m.type] for name in names) for m in its]
        slope, _ = fit(errors, [sum(w * kld for w, kld in zip(weights, m.klds, strict=True)) for m in its])
        losses |= {name: {type_: slope * error for type_, error in proxy[name].items()} for name in names}
    return {name: losses[name] for name in distortions}


def chunk_weights(measurements: Sequence[Measurement]) -> list[float]:
    """What the divergence of each chunk counts: the inverse of its sum over all measurements; together 1."""
    totals = [sum(klds) for klds in zip(*(m.klds for m in measurements), strict=True)]
    inverse = [1 / max(total, 1e-12) for total in totals]
    return [value / sum(inverse) for value in inverse]


def fit(errors: Sequence[float], klds: Sequence[float]) -> tuple[float, float]:
    """Slope and floor, neither below 0, of KL divergence over squared error: least squares of relative deviations.

    One point is taken to have no floor.
    """
    weights = [1 / max(kld, 1e-12) ** 2 for kld in klds]
    if len(errors) == 1 or max(errors) == min(errors):
        return _through_zero(errors, klds, weights), 0.0
    total = sum(weights)
    mean_error = sum(w * x for w, x in zip(weights, errors, strict=True)) / total
    mean_kld = sum(w * y for w, y in zip(weights, klds, strict=True)) / total
    spread = sum(w * (x - mean_error) ** 2 for w, x in zip(weights, errors, strict=True))
    slope = sum(w * (x - mean_error) * (y - mean_kld) for w, x, y in zip(weights, errors, klds, strict=True)) / spread
    floor = mean_kld - slope * mean_error
    if slope < 0:
        return 0.0, mean_kld
    if floor < 0:
        return _through_zero(errors, klds, weights), 0.0
    return slope, floor


def _through_zero(errors: Sequence[float], klds: Sequence[float], weights: Sequence[float]) -> float:
    squares = sum(w * x * x for w, x in zip(weights, errors, strict=True))
    return sum(w * x * y for w, x, y in zip(weights, errors, klds, strict=True)) / squares if squares > 0 else 0.0


def total(losses: Losses, types: Mapping[str, GgmlType]) -> float:
    """Of a model whose tensors have these types; tensors without losses, the norms, cost nothing."""
    return sum(its[types[name]] for name, its in losses.items())


def rank_correlations(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Spearman's and Kendall's (tau-b) rank correlation of two lists: 1 where they order alike, 0 where not at all."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    mean = (len(a) + 1) / 2
    spread = [sum((x - mean) ** 2 for x in ranks) for ranks in (ranks_a, ranks_b)]
    product = sum((x - mean) * (y - mean) for x, y in zip(ranks_a, ranks_b, strict=True))
    spearman = product / (spread[0] * spread[1]) ** 0.5 if min(spread) > 0 else 0.0
    agree = untied_a = untied_b = 0
    for i in range(len(a)):
        for j in range(i):
            x, y = _sign(a[i] - a[j]), _sign(b[i] - b[j])
            agree, untied_a, untied_b = agree + x * y, untied_a + x * x, untied_b + y * y
    kendall = agree / (untied_a * untied_b) ** 0.5 if untied_a and untied_b else 0.0
    return spearman, kendall


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    order = sorted(values)
    first = {value: i for i, value in reversed(list(enumerate(order)))}
    count = {value: order.count(value) for value in first} if len(first) < len(order) else dict.fromkeys(first, 1)
    return [first[value] + (count[value] + 1) / 2 for value in values]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
