"""The kNN distribution's temperature T, and the weight λ of the kNN-LM, chosen on held-out text.

The kNN-LM of Khandelwal et al. (2020) gives p(y) = λ·q(y) + (1 − λ)·p_base(y), q(y) ∝ Σ over the neighbours that were
followed by y of exp(−d/T). The scale of d depends on the model, so that T is looked for relative to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memdec.errors import MemdecError

# 2^-12 … 2^3 times the spread of the distances: from "the nearest neighbour alone" to "all neighbours alike".
_POWERS = range(-12, 4)
_ROWS_AT_ONCE = 1024
_SMALLEST = 1e-300  # a probability of 0 under both would give −inf; it is as good as this


def choose_temperature(
    distances: Tensor,  # (n, k) float32, inf: no neighbour
    neighbour_tokens: Tensor,  # (n, k) int, −1: no neighbour
    targets: Tensor,  # (n,) int
    base_log_prob: Tensor,  # (n,) float
) -> tuple[float, float, list[dict[str, float]]]:
    """T and λ of the greatest likelihood of the interpolated kNN-LM, on rows of held-out text.

    A grid of temperatures in powers of two, relative to the spread of the distances, then a golden-section search
    around the best; for each T the best λ is found exactly (the likelihood is concave in λ). T has 3 digits.

    Args:
        distances: of each row's neighbours, ascending or not.
        neighbour_tokens: the tokens that followed them.
        targets: the tokens that came.
        base_log_prob: log p(target) under the base model.

    Returns:
        T, λ, and the curve: for each T that was tried, ascending, ``{"temperature", "weight", "perplexity"}``.

    Raises:
        MemdecError: no rows, or no neighbours at all.
        ValueError: shapes that do not match.
    """
    if distances.dim() != 2 or neighbour_tokens.shape != distances.shape:
        raise ValueError(
            f"neighbour_tokens: got shape {tuple(neighbour_tokens.shape)} beside distances of {tuple(distances.shape)}"
        )
    if targets.shape != distances.shape[:1] or base_log_prob.shape != targets.shape:
        raise ValueError(
            f"targets, base_log_prob: got shapes {tuple(targets.shape)} and {tuple(base_log_prob.shape)}, "
            f"wanted ({len(distances)},)"
        )
    if not bool(torch.isfinite(distances).any()):
        raise MemdecError("The temperature cannot be chosen: no validation row has a neighbour. Pass a temperature.")
    scale = _spread(distances)
    tried: dict[float, tuple[float, float]] = {}

    def negative_log_likelihood(power: float) -> float:
        temperature = float(f"{scale * 2**power:.3g}")
        if temperature not in tried:
            q = target_probability(distances, neighbour_tokens, targets, temperature)
            weight = best_weight(q, base_log_prob)
            tried[temperature] = (knn_lm_loss(q, base_log_prob, weight), weight)
        return tried[temperature][0]

    best = min(_POWERS, key=negative_log_likelihood)
    low, high = best - 1.0, best + 1.0
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(10):  # 2^±1 becomes 2^±0.008
        left, right = high - golden * (high - low), low + golden * (high - low)
        if negative_log_likelihood(left) <= negative_log_likelihood(right):
            high = right
        else:
            low = left
    temperature = min(tried, key=lambda t: (tried[t][0], t))
    curve = [
        {"temperature": t, "weight": round(tried[t][1], 4), "perplexity": round(math.exp(tried[t][0]), 4)}
        for t in sorted(tried)
    ]
    return temperature, round(tried[temperature][1], 4), curve


def target_probability(
    distances: Tensor,  # (n, k), inf: no neighbour
    neighbour_tokens: Tensor,  # (n, k), −1: no neighbour
    targets: Tensor,  # (n,)
    temperature: float,
) -> Tensor:  # (n,) float64
    """q(target) of each row's kNN distribution; 0 where no neighbour was followed by it, or there is none."""
    result = torch.zeros(len(distances), dtype=torch.float64)
    for start in range(0, len(distances), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        d, tokens = distances[rows].double(), neighbour_tokens[rows]
        d = d.masked_fill(tokens < 0, math.inf)
        least = d.amin(1, keepdim=True)
        # a row without neighbours: inf − inf is NaN, which nan_to_num makes 0
        weights = torch.exp((least - d) / temperature).nan_to_num_(0.0)
        hits = (weights * (tokens == targets[rows, None])).sum(1)
        result[rows] = hits / weights.sum(1).clamp(min=_SMALLEST)
    return result


def best_weight(q: Tensor, base_log_prob: Tensor) -> float:
    """The λ in [0, 1] of the greatest Σ log(λ·q + (1 − λ)·p): where the derivative of this concave function is 0."""
    p = base_log_prob.double().exp().clamp(min=_SMALLEST)
    q = q.double()

    def slope(weight: float) -> float:
        return float(((q - p) / (weight * q + (1 - weight) * p)).sum())

    if slope(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def knn_lm_loss(q: Tensor, base_log_prob: Tensor, weight: float) -> float:
    """The mean of −log(λ·q + (1 − λ)·p) over the rows, in nats; its exponential is the kNN-LM's perplexity."""
    mixture = weight * q.double() + (1 - weight) * base_log_prob.double().exp()
    return float(-mixture.clamp(min=_SMALLEST).log().mean())


def _spread(distances: Tensor) -> float:
    """How far apart a row's neighbours typically are: the median over rows of the farthest less the nearest."""
    present = torch.isfinite(distances)
    far = distances.masked_fill(~present, -math.inf).amax(1)
    near = distances.masked_fill(~present, math.inf).amin(1)
    filled = present.any(1)
    spread = float((far - near)[filled].double().median())
    if spread > 0:
        return spread
    widest = float((far - near)[filled].max())
    return widest if widest > 0 else max(float(near[filled].double().median()), 1.0)
