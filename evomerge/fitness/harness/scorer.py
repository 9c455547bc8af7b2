"""The requests of an item of lm-eval's, put to a live model, and what the replies are worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from evomerge.engine import Engine, Generation, Likelihood, Reply
from evomerge.errors import TaskError, nearest
from evomerge.fitness.example import Example, Verdict
from evomerge.fitness.harness.library import library
from evomerge.fitness.scorers import shape
from evomerge.messages import one_line

_Answer = tuple[Reply, ...] | Likelihood


@dataclass(frozen=True)
class Request:
    """One thing that the model is asked for an item: lm-eval's `Instance`, and how the reply is
    written; None where a log-likelihood is asked for."""

    instance: Any
    how: Generation | None

    @classmethod
    def of(cls, instance: Any) -> "Request":
        """Raises TaskError for generation that no engine is asked for."""
        return cls(instance, _how(instance))

    def responses(self, answer: _Answer) -> list[Any]:
        """As lm-eval's models give them: as many as the request has repeats."""
        repeats: int = self.instance.repeats
        if isinstance(answer, Likelihood):
            return [(answer.log_likelihood, answer.greedy)] * repeats
        texts = [reply.text for reply in answer]
        return texts if len(texts) == repeats else texts * repeats


@dataclass(frozen=True)
class Item(Example):
    """An item with its requests, which lm-eval makes of its record."""

    requests: tuple[Request, ...] = ()


@dataclass(frozen=True)
class HarnessScorer:
    """Asks the requests of items, and takes from lm-eval what the replies are worth.

    task: an object of lm-eval's. metric: in [0, 1] for each item. filter: what prepares replies for
    it.
    """

    task: Any
    metric: str
    filter: str

    @classmethod
    def of(cls, task: Any, wanted: str | None) -> "HarnessScorer":
        """wanted: METRIC or METRIC,FILTER; default: the first metric that is a mean over examples,
        behind the first filter. Raises TaskError."""
        aggregation, higher = task.aggregation(), task.higher_is_better()
        mean = library().api.metrics.mean
        means = [name for name in aggregation if aggregation[name] is mean and higher.get(name)]
        chains = [chain.name for chain in task._filters]
        metric, _, chain = (wanted or "").partition(",")
        if metric and metric not in aggregation:
            raise TaskError(f"metric: '{metric}' is none of its: {nearest(metric, aggregation)}")
        if chain and chain not in chains:
            raise TaskError(f"metric: '{chain}' is none of its filters: {nearest(chain, chains)}")
        if not means or (metric and metric not in means):
            instead = f"name {' or '.join(means)}" if means else "it has no other"
            raise TaskError(
                f"metric: '{metric or ', '.join(aggregation)}' is no mean over examples of which "
                f"more is better: {instead}"
            )
        return cls(task, metric or means[0], chain or chains[0])

    @property
    def measure(self) -> str:
        """The metric and the filter, as lm-eval writes them."""
        return f"{self.metric},{self.filter}"

    @property
    def generates(self) -> bool:
        """See Scorer."""
        return bool(self.task.OUTPUT_TYPE == "generate_until")

    def judge(self, engine: Engine, items: Sequence[Example], shaped: bool) -> list[Verdict]:
        """See Scorer. Raises TaskError for a metric that leaves [0, 1]."""
        own = cast(Sequence[Item], items)  # a scorer is asked for the items of its task alone
        answers = iter(_answers(engine, [request for item in own for request in item.requests]))
        found = [[next(answers) for _ in item.requests] for item in own]
        shaping = _shaping(engine, own, found) if shaped else [0.0] * len(own)
        return [
            self._verdict(item, of, value)
            for item, of, value in zip(own, found, shaping, strict=True)
        ]

    def _verdict(self, item: Item, answers: Sequence[_Answer], shaping: float) -> Verdict:
        replies = [r for answer in answers if not isinstance(answer, Likelihood) for r in answer]
        likelihoods = [answer for answer in answers if isinstance(answer, Likelihood)]
        if any(reply.overlong for reply in replies) or any(of.overlong for of in likelihoods):
            return Verdict(0.0, shaping, overlong=True)
        score, failure = self._graded(item, answers)
        return Verdict(
            score,
            shaping,
            any(reply.truncated for reply in replies),
            round(sum(reply.tokens for reply in replies) / max(1, len(replies))),
            failure=failure,
            replies=tuple(reply.text for reply in replies),
        )

    def _graded(self, item: Item, answers: Sequence[_Answer]) -> tuple[float, str | None]:
        """The score, or why there is none."""
        instances = [
            replace(request.instance, resps=request.responses(answer), filtered_resps={})
            for request, answer in zip(item.requests, answers, strict=True)
        ]
        try:
            # Each item by itself: a reply that a filter fails on fails no other item.
            (chain,) = (chain for chain in self.task._filters if chain.name == self.filter)
            chain.apply(instances)
            results = [instance.filtered_resps[self.filter] for instance in instances]
            value = self.task.process_results(item.record, results)[self.metric]
        except Exception as error:  # whatever filters and functions of a task raise
            return 0.0, f"{type(error).__name__}: {one_line(error)}"
        score = float(value) if isinstance(value, int | float) else math.inf
        if math.isnan(score):
            return 0.0, f"{self.metric} is not a number"
        if not 0 <= score <= 1:
            raise TaskError(
                f"task '{self.task.task_name}': {self.metric} is {value!r} for an example: only "
                "metrics between 0 and 1 are scores: name another"
            )
        return score, None


def _answers(engine: Engine, requests: Sequence[Request]) -> list[_Answer]:
    """Of each request, asked together as far as they are alike."""
    alike: dict[Generation | None, list[int]] = {}
    for position, request in enumerate(requests):
        alike.setdefault(request.how, []).append(position)
    found: dict[int, _Answer] = {}
    for how, positions in alike.items():
        arguments = [requests[position].instance.arguments for position in positions]
        if how is None:
            pairs = [(prompt, answer) for prompt, answer, *_ in arguments]
            likelihoods = engine.likelihoods(pairs, ended=False)
            found.update(zip(positions, likelihoods, strict=True))
        else:
            replies = engine.generate([prompt for prompt, *_ in arguments], how)
            found.update(zip(positions, replies, strict=True))
    return [found[position] for position in range(len(requests))]


def _shaping(
    engine: Engine, items: Sequence[Item], answers: Sequence[Sequence[_Answer]]
) -> list[float]:
    """By the reference answers, which are asked for where they were not among the requests."""
    found = [of[item.right if len(of) > 1 else 0] for item, of in zip(items, answers, strict=True)]
    lacking = [
        (item.prompt, item.reference)
        for item, of in zip(items, found, strict=True)
        if not isinstance(of, Likelihood)
    ]
    asked = iter(engine.likelihoods(lacking) if lacking else [])
    likelihoods = [of if isinstance(of, Likelihood) else next(asked) for of in found]
    return [shape(of.token_log_likelihoods or (-math.inf,)) for of in likelihoods]


def _how(instance: Any) -> Generation | None:
    """How a reply is written; None where a log-likelihood is asked for."""
    if instance.request_type == "loglikelihood":
        return None
    if instance.request_type != "generate_until":
        raise TaskError(f"requests of type '{instance.request_type}' cannot be answered")
    options = dict(library().models.utils.normalize_gen_kwargs(instance.arguments[1]))
    until, tokens = options.pop("until"), options.pop("max_gen_toks")
    sampled, temperature = options.pop("do_sample"), options.pop("temperature", 0.0)
    if sampled and not temperature:
        raise TaskError("generation_kwargs: do_sample: true needs a temperature above 0")
    top_p = options.pop("top_p", 1.0) if sampled else 1.0
    # What changes nothing of one beam, or of replies that are not drawn.
    inert = {"num_beams"} if options.get("num_beams") == 1 else set()
    inert |= set() if sampled else {"top_k", "top_p", "min_p", "typical_p"}
    for option in sorted(options.keys() - inert):
        raise TaskError(f"generation_kwargs: '{option}' cannot be set: leave it out")
    stop = tuple(str(text) for text in until if text)
    samples = instance.repeats if sampled else 1
    return Generation(tokens, stop, samples, temperature, top_p)
