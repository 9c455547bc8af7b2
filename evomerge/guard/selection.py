"""How much of a chosen candidate's score is the luck of being the best of many.

Scores are per example, in [0, 1]. A search chooses among candidates that it proposed itself, each
scored on some examples of train, most of them on the same. `Tried` says what their scores
are worth before anyone has seen others; `bbc_cv` what the choosing itself is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.results import Scores
from evomerge.guard.estimates import LEVEL, Estimate, shares_of, wilson

Values = NDArray[np.float64]

_NEIGHBOURS = 200  # candidates that a prior is fitted to: benchmarks/claims.py
_ROUNDS = 10  # of fitting how hard examples are
_BOOTSTRAPS = 200


@dataclass(frozen=True)
class Sampled:
    """What a weighted mean over tasks rests on: as many examples of one task, each with this
    variance, would leave as much to chance."""

    value: float
    examples: float
    variance: float

    @classmethod
    def of(cls, tasks: Mapping[str, Scores], weights: Mapping[str, float]) -> "Sampled":
        """Two successes and two failures are added to each task (Agresti and Coull 1998), so that
        no score of a few examples looks certain."""
        shares = shares_of(tasks, weights)
        value = of_one = of_all = 0.0
        for task, share in shares.items():
            scores = tasks[task].scores.astype(np.float64)
            n = len(scores)
            mean = (float(scores.sum()) + 2) / (n + 4)
            variance = (float(scores @ scores) + 2) / (n + 4) - mean**2
            value += share * float(scores.mean())
            of_one += share**2 / n
            of_all += share**2 * variance / n
        return cls(value, 1 / of_one, of_all / of_one)

    @property
    def standard_error(self) -> float:
        """Of the value."""
        return math.sqrt(self.variance / self.examples)


@dataclass(eq=False)
class _Met:
    """Those that met the same examples of a task.

    examples: (n,) positions. sums: (n,) of their scores. count: how many they are.
    """

    examples: NDArray[np.uint32]
    sums: Values
    count: int = 0

    def add(self, scores: Scores, times: int = 1) -> None:
        """Of one of them; -1 times, of one that is no longer."""
        self.sums += times * scores.scores
        self.count += times


class Tried:
    """The models that a search tried and chose among, in the order in which it met them.

    What it does not know of a candidate's score is estimated from those that were proposed about
    the same time (empirical Bayes): a normal prior is fitted to the nearest _NEIGHBOURS, as those
    of a search's beginning say little of its end. Scores on different examples are made comparable
    first: how hard each example is is fitted together with how good each candidate is.
    """

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self._scored: list[Mapping[str, Scores]] = []
        self._sampled: list[Sampled] = []
        self._shares: list[dict[str, float]] = []
        self._met: list[dict[str, _Met]] = []  # of each, by task
        self._all_met: dict[str, dict[bytes, _Met]] = {}  # by task and examples

    def add(self, model: str, tasks: Mapping[str, Scores], weights: Mapping[str, float]) -> None:
        """Results of a model, by the hash of its recipe; of one that comes again those on more
        examples stay."""
        shares, sampled = shares_of(tasks, weights), Sampled.of(tasks, weights)
        at = self._at.get(model)
        if at is None:
            self._at[model] = len(self._scored)
            self._scored.append(tasks)
            self._sampled.append(sampled)
            self._shares.append(shares)
            self._met.append({task: self._together(task, tasks[task]) for task in shares})
        elif sampled.examples > self._sampled[at].examples:
            for task, met in self._met[at].items():
                met.add(self._scored[at][task], -1)
                if not met.count:
                    del self._all_met[task][met.examples.tobytes()]
            self._scored[at], self._sampled[at], self._shares[at] = tasks, sampled, shares
            self._met[at] = {task: self._together(task, tasks[task]) for task in shares}

    def _together(self, task: str, scores: Scores) -> _Met:
        """Those that met the same examples of a task as a model with these scores, it included."""
        groups, key = self._all_met.setdefault(task, {}), scores.examples.tobytes()
        if key not in groups:
            groups[key] = _Met(scores.examples, np.zeros(len(scores)))
        groups[key].add(scores)
        return groups[key]

    def __contains__(self, model: object) -> bool:
        return model in self._at

    def shrunk(self) -> dict[str, float]:
        """What each model's score is expected to be on new examples."""
        values = self._comparable()
        prior = self._prior(values)
        trust = prior.trust(self._examples, self._variances)
        expected = prior.mean + trust * (values - prior.mean)
        return dict(zip(self._at, expected.tolist(), strict=True))

    def estimate(self, model: str) -> Estimate:
        """The expected score of a model, from the results that it was added with.

        The interval is as wide as that of as many examples without any choice: shrinking takes the
        luck out of choosing, and leaves that of which examples there are.
        """
        values, at = self._comparable(), self._at[model]
        return self._estimate(at, replace(self._sampled[at], value=float(values[at])), values)

    def reconsidered(
        self, model: str, tasks: Mapping[str, Scores], weights: Mapping[str, float]
    ) -> Estimate:
        """The same from other results of it, such as those on all of train."""
        return self._estimate(self._at[model], Sampled.of(tasks, weights), self._comparable())

    def _estimate(self, at: int, found: Sampled, values: Values) -> Estimate:
        prior = self._prior(values)
        mean = float(prior.mean[at])
        examples, variances = (np.full(len(values), x) for x in (found.examples, found.variance))
        trust = float(prior.trust(examples, variances)[at])
        expected = min(1.0, max(0.0, mean + trust * (found.value - mean)))
        return wilson(expected, found.examples)

    @property
    def _examples(self) -> Values:
        return np.array([found.examples for found in self._sampled])

    @property
    def _variances(self) -> Values:
        return np.array([found.variance for found in self._sampled])

    def _prior(self, values: Values) -> "_Prior":
        examples = self._examples
        weight = _near(examples)
        mean = _near(examples * values) / weight
        of_one = _near(examples * self._variances) / weight
        # Weighted by their squared number of examples, what candidates differ by has a known share
        # of noise, even where the lucky ones were given more examples.
        k = min(_NEIGHBOURS, len(values))
        seen = _near((examples * (values - mean)) ** 2) * k / max(1, k - 1)
        spread = np.maximum(0.0, (seen - of_one * weight) / _near(examples**2))
        return _Prior(mean, spread, of_one)

    def _comparable(self) -> Values:
        """Each model's weighted mean over its tasks, (n,), as if all had met the same examples."""
        values = np.array([found.value for found in self._sampled])
        for task, groups in self._all_met.items():
            if len(groups) > 1:
                values -= self._luck(task, list(groups.values()))
        return values

    def _luck(self, task: str, groups: list[_Met]) -> Values:
        """How much easier than others the examples are that each model met, (n,), by its share.

        Of score = model + example, fitted by least squares, one after the other. Models that met
        the same examples are fitted as one: each generation has few such groups, however many
        candidates it has.
        """
        sizes = np.array([len(group.examples) for group in groups])
        counts = np.array([group.count for group in groups])
        owners = np.repeat(np.arange(len(groups)), sizes)
        positions = np.concatenate([group.examples for group in groups]).astype(np.intp)
        columns = (np.cumsum(np.bincount(positions) > 0) - 1)[positions]
        scores = np.concatenate([group.sums for group in groups])
        times, of_examples = np.bincount(columns, counts[owners]), np.bincount(columns, scores)
        of_groups = np.bincount(owners, scores)
        ease = np.zeros(len(times))
        for _ in range(_ROUNDS):
            models = (of_groups - counts * np.bincount(owners, ease[columns])) / sizes
            ease = (of_examples - np.bincount(columns, models[owners])) / times
            ease -= ease.mean()
        luck = np.bincount(owners, ease[columns]) / sizes
        of_group = dict(zip(groups, luck.tolist(), strict=True))
        found = [0.0 if task not in met else of_group[met[task]] for met in self._met]
        return np.array(found) * [shares.get(task, 0.0) for shares in self._shares]


@dataclass(frozen=True)
class _Prior:
    """For each place among those tried, (n,): what models there score, its variance, and the
    variance of one example."""

    mean: Values
    spread: Values
    of_one: Values

    def trust(self, examples: Values, own: Values) -> Values:
        """The share of what is seen beyond the mean that is no luck, on as many examples.

        own: the variance of one example in what is seen. That of the truth lies between it and the
        mean's, as far along as the truth does.
        """
        found = self.spread / (self.spread + self.of_one / examples)
        noise = self.of_one + found * (own - self.of_one)
        trusted: Values = self.spread / (self.spread + noise / examples)
        return trusted


def _near(values: Values) -> Values:
    """Of each place the sum over the _NEIGHBOURS nearest, itself among them."""
    n = len(values)
    k = min(_NEIGHBOURS, n)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.clip(np.arange(n) - k // 2, 0, n - k)
    found: Values = sums[first + k] - sums[first]
    return found


def bbc_cv(
    tasks: Mapping[str, NDArray[np.float32]],
    weights: Mapping[str, float],
    random: np.random.Generator,
) -> Estimate:
    """The weighted mean score that choosing the best candidate leads to on new examples.

    Bootstrap bias-corrected cross-validation (arXiv 1708.07180, BBC-CV): choose on a resample of
    the examples, score on those left out; resampled within each task, so that each keeps its
    weight. tasks: by name, (candidates, examples), NaN where a candidate was not scored; one of
    them at least was scored in every task. Where nobody can be both chosen and scored nothing is
    known.
    """
    inside, outside, raw = (np.zeros(1) for _ in range(3))
    for task, share in shares_of(tasks, weights).items():
        n = tasks[task].shape[1]
        drawn = random.multinomial(n, np.full(n, 1 / n), size=_BOOTSTRAPS)
        inside = inside + share * _means(tasks[task], drawn)
        outside = outside + share * _means(tasks[task], drawn == 0)
        raw = raw + share * _means(tasks[task], np.ones((1, n)))
    chosen = np.where(np.isnan(inside), -np.inf, inside).argmax(axis=0)
    each = np.arange(_BOOTSTRAPS)
    found = outside[chosen, each][~np.isnan(inside[chosen, each] + outside[chosen, each])]
    if not len(found):
        return Estimate(float(np.nanmax(raw)), (0.0, 1.0))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Resamples of what is always right, or never, are all alike; so many examples prove no more.
    value, shares = float(found.mean()), shares_of(tasks, weights)
    own = wilson(value, 1 / sum(share**2 / tasks[t].shape[1] for t, share in shares.items()))
    return Estimate(value, (min(float(low), own.interval[0]), max(float(high), own.interval[1])))


def _means(scores: NDArray[np.float32], counts: NDArray[Any]) -> Values:
    """Of each candidate's scores, (candidates, examples), on each resample that takes an example so
    often, (resamples, examples): (candidates, resamples), NaN where it has none of them."""
    met, times = ~np.isnan(scores), counts.T.astype(np.float32)
    total = np.where(met, scores, np.float32(0)) @ times
    of = met.astype(np.float32) @ times
    found: Values = np.where(of > 0, total, np.nan) / np.maximum(of, 1)
    return found.astype(np.float64)
