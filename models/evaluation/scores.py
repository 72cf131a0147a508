"""Scores from features: how far generated images are from real ones, how much of them they cover, what they copy.

Everything here is arithmetic on rows of numbers (n, d), float: features or flattened pixels. Nothing reads a data set
or a bundle. Distances are Euclidean and computed in chunks, so memory is bounded for any number of rows. Rows must be
finite and equally long on both sides; too few rows are a ValueError.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.evaluation.parzen import chunk_rows, exact_float32, kmeans_centroids

MIN_ROWS = 6  # the fifth neighbour of density and coverage
_JACKKNIFE_GROUPS = 10
_EXTRAPOLATION_SHARES = (0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
_EXTRAPOLATION_DRAWS = 4


class Estimate(NamedTuple):
    """A score and its standard error; None if it is not known."""

    value: float
    standard_error: float | None = None


class Moments(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d) of rows, float64."""

    mean: Tensor
    covariance: Tensor


def moments(rows: Tensor) -> Moments:
    """Mean and covariance of (n, d) rows.

    Raises:
        ValueError: Fewer than two rows.
    """
    _require(rows, 2)
    rows = rows.double()
    return Moments(rows.mean(dim=0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1]))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the Fréchet distance of two normal distributions (Dowson & Landau 1982).

    With features of a classifier this is the FID of Heusel et al. 2017 (arXiv 1706.08500). The root has the same trace
    as (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric, so singular covariances need no offset.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def frechet(a: Tensor, b: Tensor, *, seed: int = 0) -> Estimate:
    """Fréchet distance of two sets of rows, with the standard error of a delete-a-group jackknife over both sets.

    It is biased upwards by about 1/n, differently for each generator (Chong & Forsyth 2020, arXiv 1911.07023): compare
    it only at equal numbers of rows, or see `frechet_at_infinity`.
    """
    rng = torch.Generator().manual_seed(seed)
    groups = [torch.randperm(len(rows), generator=rng) % _JACKKNIFE_GROUPS for rows in (a, b)]
    value = frechet_distance(moments(a), moments(b))
    if min(len(a), len(b)) < 3 * _JACKKNIFE_GROUPS:
        return Estimate(value)
    left_out = [
        frechet_distance(
            *(moments(rows[(group != g).to(rows.device)]) for rows, group in zip((a, b), groups, strict=True))
        )
        for g in range(_JACKKNIFE_GROUPS)
    ]
    return Estimate(value, math.sqrt((_JACKKNIFE_GROUPS - 1) * float(np.var(left_out))))


def frechet_at_infinity(a: Tensor, b: Tensor, *, seed: int = 0) -> Estimate:
    """The Fréchet distance extrapolated to infinitely many rows: the intercept of a line in 1/n (Chong & Forsyth 2020).

    Both sets are cut to the same shares of their rows, several draws each. It can come out slightly negative.
    """
    rng = torch.Generator().manual_seed(seed)
    inverse, found = [], []
    for share in _EXTRAPOLATION_SHARES:
        for _ in range(_EXTRAPOLATION_DRAWS if share < 1 else 1):
            parts = [
                rows[torch.randperm(len(rows), generator=rng)[: max(2, round(share * len(rows)))].to(rows.device)]
                for rows in (a, b)
            ]
            found.append(frechet_distance(moments(parts[0]), moments(parts[1])))
            inverse.append(1 / share)
    slope, intercept = np.polyfit(inverse, found, 1)
    residuals = np.asarray(found) - (intercept + slope * np.asarray(inverse))
    x = np.asarray(inverse)
    variance = residuals.var(ddof=2) * (1 / len(x) + x.mean() ** 2 / ((x - x.mean()) ** 2).sum())
    return Estimate(float(intercept), math.sqrt(variance))


def kernel_distance(a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 1_000, seed: int = 0) -> Estimate:
    """Squared maximum mean discrepancy under (x·y/d + 1)³, unbiased: the KID of Bińkowski et al. 2018 (1801.01401).

    The mean over random subsets and its standard error. Its expectation for equal distributions is 0, so it can be
    negative.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("the kernel distance needs at least two rows of each")
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x, y = (rows[torch.randperm(len(rows), generator=rng)[:size].to(rows.device)].double() for rows in (a, b))
        found.append(_unbiased_mmd(x, y))
    error = float(np.std(found, ddof=1) / math.sqrt(subsets)) if subsets > 1 else None
    return Estimate(float(np.mean(found)), error)


def _unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """Equation 4 of Bińkowski et al. 2018 for equally many rows."""
    n, d = x.shape
    within = sum(((k.sum() - k.trace()) / (n * (n - 1))) for k in (_cubic(x, x, d), _cubic(y, y, d)))
    return float(within - 2 * _cubic(x, y, d).mean())


def _cubic(x: Tensor, y: Tensor, d: int) -> Tensor:
    return (x @ y.T / d + 1) ** 3


class Neighbours(NamedTuple):
    """The k nearest points of each query, nearest first: `distances` and `indices`, both (n, k)."""

    distances: Tensor
    indices: Tensor


def nearest(queries: Tensor, points: Tensor, k: int = 1, *, own: Tensor | None = None) -> Neighbours:
    """The k nearest points of every query.

    Args:
        queries, points: (n, d) and (m, d) on one device.
        k: At most m, or m − 1 where `own` is given.
        own: (n,), for queries that are points themselves: the index of each, which doesn't count as its neighbour.
    """
    if k > len(points) - (own is not None):
        raise ValueError(f"{k} neighbours need more than {len(points)} points")
    distances, indices = [], []
    rows = chunk_rows(points)
    for start in range(0, len(queries), rows):
        squared = _squared_distances(queries[start : start + rows], points)
        if own is not None:
            squared.scatter_(1, own[start : start + rows, None].to(squared.device), math.inf)
        values, at = squared.topk(k, dim=1, largest=False)
        distances.append(values.sqrt())
        indices.append(at)
    return Neighbours(torch.cat(distances), torch.cat(indices))


def _squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """(n, m) squared distances, as |q|² + |p|² − 2q·p with the points' mean at the origin, where norms are small."""
    centre = points.mean(dim=0)
    queries, points = queries - centre, points - centre
    with exact_float32(points.device.type):
        squared = torch.addmm(points.square().sum(dim=1), queries, points.T, alpha=-2.0)
    return squared.add_(queries.square().sum(dim=1, keepdim=True)).clamp_min_(0.0)


def _radii(rows: Tensor, k: int) -> Tensor:
    """Distance from each row to its k-th nearest other row; (n,)."""
    return nearest(rows, rows, k, own=torch.arange(len(rows), device=rows.device)).distances[:, -1]


class Overlap(NamedTuple):
    """How two clouds of rows overlap; see `overlap`."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def overlap(real: Tensor, generated: Tensor, *, k_manifold: int = 3, k_density: int = 5) -> Overlap:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), from balls.

    A set's ball around a row reaches to the row's k-th nearest neighbour in its own set (k = 3 for the first two, 5 for
    the others). Precision: the share of generated rows in any real ball. Recall: of real rows in any generated ball.
    Density: real balls around a generated row, over k; about 1 where the sets are alike, and not bounded. Coverage: the
    share of real balls that hold a generated row; 1 − 2⁻ᵏ ≈ 0.97 is expected of equal distributions.

    Standard errors treat rows as independent, which the balls are not, so they are a rough guide.

    Raises:
        ValueError: Six rows are needed on each side.
    """
    _require(real, k_density + 1)
    _require(generated, k_density + 1)
    manifold, near, own = _radii(real, k_manifold), _radii(real, k_density), _radii(generated, k_manifold)
    precise, dense = [], []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    closest = torch.full((len(real),), math.inf, device=real.device)
    rows = chunk_rows(real)
    for start in range(0, len(generated), rows):
        distances = _squared_distances(generated[start : start + rows], real).sqrt_()
        precise.append((distances <= manifold).any(dim=1))
        dense.append((distances <= near).sum(dim=1).double() / k_density)
        recalled |= (distances <= own[start : start + rows, None]).any(dim=0)
        closest = torch.minimum(closest, distances.amin(dim=0))
    density = torch.cat(dense)
    return Overlap(
        _share(torch.cat(precise)),
        _share(recalled),
        Estimate(density.mean().item(), (density.std() / math.sqrt(len(density))).item()),
        _share(closest <= near),
    )


def classifier_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> Estimate:
    """exp E KL(p(y|x) ‖ p(y)) of logits (n, classes): the Inception score of Salimans et al. 2016, by another net.

    The mean over `splits` parts of the shuffled rows and its standard error. It is 1 if all rows are alike, and at most
    the number of classes, if every row is certain and all classes are equally frequent.
    """
    rng = torch.Generator().manual_seed(seed)
    rows = logits[torch.randperm(len(logits), generator=rng).to(logits.device)].double().log_softmax(dim=1)
    scores = []
    for part in rows.tensor_split(max(1, min(splits, len(rows) // 5))):
        marginal = part.exp().mean(dim=0, keepdim=True).log()
        scores.append((part.exp() * (part - marginal)).sum(dim=1).mean().exp().item())
    error = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    return Estimate(float(np.mean(scores)), error)


def class_divergence(classes: Tensor, frequencies: Sequence[float]) -> float:
    """KL(histogram ‖ frequencies) in nats; classes (n,) int64. Exact sampling is expected to give (K − 1) / 2n.

    Half a row is added to every class on the side of the frequencies, so that the divergence stays finite.
    """
    counts = torch.bincount(classes.cpu(), minlength=len(frequencies)).double()
    share = counts / counts.sum()
    smoothed = torch.tensor(frequencies, dtype=torch.float64) * len(classes) + 0.5
    expected = smoothed / smoothed.sum()
    return float(torch.special.xlogy(share, share / expected).sum())


class Accuracy(NamedTuple):
    """Share of rows of the class that was asked for: of all rows, and of the class where that share is lowest."""

    overall: Estimate
    worst: Estimate
    worst_class: int


def conditional_accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """How often the classifier finds the labels (n,) that the generator was asked for.

    Classes that were never asked for are left out.
    """
    labels = labels.to(logits.device)
    right = logits.argmax(dim=1) == labels
    of_class = {int(label): _share(right[labels == label]) for label in torch.unique(labels)}
    worst = min(of_class, key=lambda label: of_class[label].value)
    return Accuracy(_share(right), of_class[worst], worst)


def authenticity(generated: Tensor, train: Tensor) -> Estimate:
    """Share of generated rows that are no copies: further from their nearest training row than that is from another.

    Alaa et al. 2022 (arXiv 2102.08921), section 3.3.
    Copies get 0. What fresh real rows get depends on the features, so read it beside its floor.
    """
    found = nearest(generated, train)
    star, back = torch.unique(found.indices[:, 0], return_inverse=True)
    own = nearest(train[star], train, own=star).distances[:, 0]
    return _share(found.distances[:, 0] > own[back])


def copying(generated: Tensor, held_out: Tensor, train: Tensor, *, cells: int | None = None, seed: int = 0) -> float:
    """C_T of Meehan et al. 2020 (arXiv 2004.05675): whether generated rows are nearer to training rows than fresh ones.

    In each cell of a k-means partition of the training rows, the Mann-Whitney Z of the generated rows' distances to
    their nearest training row against the held-out rows'; the mean over cells, weighted by held-out rows. A value under
    −3 means copying, one far above 0 that the generated rows are off the data. Cells with fewer than ten rows of either
    are left out; if that leaves none, the result is 0.

    Args:
        cells: How many; None is one for every 200 held-out rows, 50 at most.
        seed: Decides where the k-means starts.
    """
    k = max(1, min(50, len(held_out) // 200, len(train))) if cells is None else cells
    start = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:k].to(train.device)
    centroids = kmeans_centroids(train, train[start], iterations=10)
    distances, places = zip(
        *(
            (nearest(rows, train).distances[:, 0], nearest(rows, centroids).indices[:, 0])
            for rows in (generated, held_out)
        ),
        strict=True,
    )
    total, weight = 0.0, 0
    for cell in range(k):
        mine, theirs = ((d[p == cell]).cpu().numpy() for d, p in zip(distances, places, strict=True))
        if min(len(mine), len(theirs)) >= 10 or k == 1:
            total += len(theirs) * mann_whitney_z(mine, theirs)
            weight += len(theirs)
    return total / weight if weight else 0.0


def mann_whitney_z(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """Normal score of Mann & Whitney's U, negative if a's numbers tend to be smaller than b's."""
    n, m = len(a), len(b)
    ordered = np.sort(b)
    u = 0.5 * (np.searchsorted(ordered, a, "left") + np.searchsorted(ordered, a, "right")).sum()
    _, ties = np.unique(np.concatenate([a, b]), return_counts=True)
    spread = n * m / 12 * (n + m + 1 - (ties.astype(np.float64) ** 3 - ties).sum() / ((n + m) * (n + m - 1)))
    return float((u - n * m / 2) / math.sqrt(spread)) if spread > 0 else 0.0


def two_sample_accuracy(real: Tensor, generated: Tensor, *, seed: int = 0) -> Estimate:
    """How often a row's nearest neighbour in the two sets is of its own kind (Lopez-Paz & Oquab 2017, 1610.06545).

    Both sets are cut to the same number of rows. ½ for equal distributions, near 1 if they can be told apart, under ½
    if generated rows sit beside the very real rows that they are compared with.
    """
    n = min(len(real), len(generated))
    rng = torch.Generator().manual_seed(seed)
    both = torch.cat([rows[torch.randperm(len(rows), generator=rng)[:n].to(rows.device)] for rows in (real, generated)])
    of = nearest(both, both, own=torch.arange(2 * n, device=both.device)).indices[:, 0]
    return _share((of < n) == (torch.arange(2 * n, device=both.device) < n))


def _share(hits: Tensor) -> Estimate:
    """The share of true values and its binomial standard error."""
    p = hits.double().mean().item()
    return Estimate(p, math.sqrt(p * (1 - p) / len(hits)))


def _require(rows: Tensor, least: int) -> None:
    if len(rows) < least:
        raise ValueError(f"at least {least} rows are needed, got {len(rows)}")
