"""What every optimizer keeps to: the cube, the log, and refusal of nonsense."""

import logging
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, get_args

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evomerge.coordinates import Coordinate, When, active, choice, placed
from evomerge.errors import JobError
from evomerge.job import Optimizer as Section
from evomerge.optimizer import (
    Asked,
    Genotypes,
    Optimizer,
    Told,
    ToldNonsense,
    build,
    choose,
    population,
)

SIZE, D = 6, 5
OPTIMUM = 0.7
NAMES = tuple(n for n in get_args(Section.model_fields["name"].annotation) if n != "auto")
CONTINUOUS_ONLY = ("cma-es", "lra-cma-es")
ONE_OBJECTIVE = (*CONTINUOUS_ONLY, "cma-es-margin")
MOVING = ONE_OBJECTIVE  # they have a step size
SLOW = {
    "tpe": 4,
    "nsga2": 20,
}  # the most generations that a test needs of what takes long to propose
Values = NDArray[np.float64]
Entries = list[Asked | Told]
New = Callable[..., Optimizer]


def continuous(d: int, start: float = 0.3) -> tuple[Coordinate, ...]:
    return tuple(Coordinate(f"weight {i}", start) for i in range(d))


MIXED = (
    Coordinate("scale", 0.3),
    Coordinate("depth", placed(1, 4), choices=4),
    Coordinate("method", placed(2, 3), choices=3, ordered=False),
    Coordinate("copies", placed(3, 9), choices=9),
    Coordinate("rescale", placed(0, 2), choices=2),
    Coordinate("density", 0.6),
)
CONDITIONAL = (
    Coordinate("method", placed(0, 3), choices=3, ordered=False),
    Coordinate("density", 0.8, when=When(0, frozenset({0, 1}))),
    Coordinate("keep", placed(1, 2), choices=2, when=When(0, frozenset({1}))),
    Coordinate("share", 0.9, when=When(2, frozenset({0}))),
    Coordinate("scale", 0.4),
)


def make(name: str, coordinates: Sequence[Coordinate], size: int = SIZE, **more: Any) -> Optimizer:
    return build(Section(name=name, population=size), coordinates, 0.15, **{"seed": 1, **more})


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def new(name: str) -> New:
    """Makes an optimizer of each kind."""

    def one(d: int = D, size: int = SIZE, seed: int = 1, start: float = 0.3) -> Optimizer:
        return make(name, continuous(d, start), size, seed=seed)

    return one


def suited(name: str) -> tuple[Coordinate, ...]:
    """The most varied coordinates that an optimizer takes."""
    return continuous(D) if name in CONTINUOUS_ONLY else MIXED


def concave(genotypes: Genotypes) -> Values:
    """Highest, 0, where every coordinate is OPTIMUM."""
    return np.asarray(-((genotypes - OPTIMUM) ** 2).sum(axis=1))


def run(optimizer: Optimizer, generations: int) -> Entries:
    """Ask and tell in turns, and the log of it."""
    log: Entries = []
    for _ in range(generations):
        asked = optimizer.ask()
        told = Told(asked.copy(), concave(asked))
        log += [Asked(asked.copy()), told]
        optimizer.tell(told.genotypes, told.fitness)
    return log


def proposals(log: Entries) -> list[bytes]:
    return [entry.genotypes.tobytes() for entry in log if isinstance(entry, Asked)]


def same(one: Entries, other: Entries) -> bool:
    """Whether the same was asked, bit for bit."""
    return proposals(one) == proposals(other)


def read_only(values: Values) -> Values:
    """As a store gives it back."""
    return np.frombuffer(values.tobytes()).reshape(values.shape)


def stored(log: Entries) -> Entries:
    return [
        Asked(read_only(entry.genotypes))
        if isinstance(entry, Asked)
        else Told(read_only(entry.genotypes), read_only(entry.fitness))
        for entry in log
    ]


# Points


@pytest.mark.parametrize(("d", "size"), [(2, 4), (2, 6), (24, 13)])
@pytest.mark.parametrize("start", [0.0, 0.3, 1.0])
def test_asks_are_a_population_of_points_in_the_cube(
    name: str, d: int, size: int, start: float
) -> None:
    optimizer = make(name, continuous(d, start), size)
    for entry in run(optimizer, SLOW.get(name, 20)):
        if isinstance(entry, Asked):
            assert entry.genotypes.shape == (size, d)
            assert entry.genotypes.dtype == np.float64
            assert ((entry.genotypes >= 0) & (entry.genotypes <= 1)).all()
    assert optimizer.size == size


def test_any_number_can_be_asked_for(new: New) -> None:
    optimizer = new()
    assert [optimizer.ask(count).shape for count in (1, 4, 11)] == [(1, D), (4, D), (11, D)]


def test_a_generation_is_not_one_point_many_times(new: New) -> None:
    asked = new().ask()
    assert len(np.unique(asked, axis=0)) == SIZE


def test_a_choice_stands_in_the_middle_of_its_part(name: str) -> None:
    coordinates = suited(name)
    for entry in run(make(name, coordinates), 8):
        for i, coordinate in enumerate(coordinates):
            if k := coordinate.choices:
                values = {placed(choice(float(v), k), k) for v in entry.genotypes[:, i]}
                assert set(entry.genotypes[:, i].tolist()) == values


@pytest.mark.parametrize("name", ["cma-es-margin", "qmc", "random"])
def test_every_choice_is_proposed_sooner_or_later(name: str) -> None:
    log = run(make(name, MIXED, size=10), 40)
    asked = np.concatenate([entry.genotypes for entry in log])
    for i, coordinate in enumerate(MIXED):
        if k := coordinate.choices:
            assert {choice(float(value), k) for value in asked[:, i]} == set(range(k))


@pytest.mark.parametrize(
    "coordinates",
    [
        continuous(1),
        MIXED[1:2],
        MIXED[2:3],
        MIXED[4:5],
        (MIXED[0], MIXED[2]),
        (MIXED[1], MIXED[3]),
        (MIXED[2], MIXED[4]),
        (Coordinate("at the end", 1.0), Coordinate("last", placed(8, 9), choices=9)),
    ],
    ids=lambda coordinates: "+".join(c.name for c in coordinates),
)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in CONTINUOUS_ONLY])
def test_spaces_of_one_kind_and_of_one_coordinate_are_searched(
    name: str, coordinates: tuple[Coordinate, ...]
) -> None:
    optimizer = make(name, coordinates)
    for entry in run(optimizer, 12):
        assert entry.genotypes.shape == (SIZE, len(coordinates))
        assert ((entry.genotypes >= 0) & (entry.genotypes <= 1)).all()
    mean = optimizer.mean()
    assert mean is None or ((mean >= 0) & (mean <= 1)).all()


# Determinism and the log


def test_equal_seeds_and_tells_give_bit_identical_proposals(name: str) -> None:
    one, other = (make(name, continuous(30), size=8) for _ in range(2))
    generations = SLOW.get(name, 30)
    assert same(run(one, generations), run(other, generations))


def test_other_seeds_give_other_proposals(new: New) -> None:
    assert not same(run(new(seed=1), 1), run(new(seed=2), 1))


def test_global_generators_change_nothing_and_are_not_moved(new: New) -> None:
    reference = run(new(), 10)
    np.random.seed(3)  # noqa: NPY002 the global generators are the subject
    random.seed(3)
    before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    optimizer = new()
    first = run(optimizer, 5)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before  # noqa: NPY002
    np.random.seed(4)  # noqa: NPY002
    random.seed(4)
    assert same(first + run(optimizer, 5), reference)


def test_two_optimizers_at_once_do_not_disturb_each_other(new: New) -> None:
    reference = run(new(), 10)
    one, other = new(), new(seed=9)
    taken_in_turns: Entries = []
    for _ in range(10):
        taken_in_turns += run(one, 1)
        run(other, 1)
    assert same(taken_in_turns, reference)


@pytest.mark.parametrize("entries", [0, 1, 2, 13, 16])
def test_a_replayed_log_goes_on_bit_identically(name: str, entries: int) -> None:
    """An odd number: it stopped while a generation was being scored."""
    coordinates = suited(name)
    whole = run(make(name, coordinates), 10)
    resumed = make(name, coordinates)
    assert resumed.replay(stored(whole[:entries])) is None
    if entries % 2:
        told = whole[entries]
        assert isinstance(told, Told)
        resumed.tell(told.genotypes, told.fitness)
    rest = whole[entries + entries % 2 :]
    assert same(run(resumed, len(rest) // 2), rest)


def asynchronous(optimizer: Optimizer, seed: int, steps: int, d: int) -> Entries:
    """Ask for some, tell some of those that are due in any order, and now and then tell of points
    that nobody asked for; whatever comes, it depends on the seed alone."""
    order = np.random.default_rng(seed)
    log: Entries = []
    due: list[NDArray[np.float64]] = []
    for _ in range(steps):
        if not due or order.random() < 0.4:
            asked = optimizer.ask(int(order.integers(1, 5)))
            log.append(Asked(asked.copy()))
            due += list(asked.copy())
            continue
        some = [due.pop(int(order.integers(len(due)))) for _ in range(min(3, len(due)))]
        if order.random() < 0.3:
            some.append(order.random(d))
        told = Told(np.array(some), concave(np.array(some)) + order.normal(size=len(some)))
        log.append(told)
        optimizer.tell(told.genotypes, told.fitness)
    return log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "suited") for name in NAMES),
        *((name, "conditional") for name in NAMES if name not in CONTINUOUS_ONLY),
    ],
)
def test_an_asynchronous_log_is_replayed_from_anywhere(name: str, kind: str) -> None:
    coordinates = suited(name) if kind == "suited" else CONDITIONAL
    steps, d = (40 if name in SLOW else 80), len(coordinates)
    whole = asynchronous(make(name, coordinates), 5, steps, d)
    assert sum(isinstance(entry, Told) for entry in whole) > steps / 3
    for kept in (3, steps // 2, steps - 1):
        resumed = make(name, coordinates)
        assert resumed.replay(stored(whole[:kept])) is None
        for entry in whole[kept:]:
            if isinstance(entry, Asked):
                asked = resumed.ask(len(entry.genotypes))
                assert asked.tobytes() == entry.genotypes.tobytes()
            else:
                resumed.tell(entry.genotypes, entry.fitness)


@settings(derandomize=True, deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**32), kept=st.integers(0, 40))
@pytest.mark.parametrize("name", NAMES)
def test_any_prefix_of_any_log_is_replayed(name: str, seed: int, kept: int) -> None:
    coordinates = suited(name)
    first, resumed = (make(name, coordinates) for _ in range(2))
    assert resumed.replay(asynchronous(first, seed, kept, len(coordinates))) is None
    assert resumed.ask(3).tobytes() == first.ask(3).tobytes()
    assert resumed.size == first.size


def test_a_log_of_another_optimizer_is_learnt_from(name: str) -> None:
    """Its tells alone: what was proposed by another is no proposal of this one."""
    log = [e for e in run(make("random", continuous(D), size=10, seed=4), 8) if isinstance(e, Told)]
    one, other = (make(name, continuous(D)) for _ in range(2))
    assert one.replay(log) is None
    for entry in log:
        other.tell(entry.genotypes, entry.fitness)
    assert one.ask().tobytes() == other.ask().tobytes()
    if name not in ("random", "qmc"):
        assert one.ask().tobytes() != make(name, continuous(D)).ask().tobytes()


def test_replay_says_where_its_proposals_differ_and_goes_on(new: New) -> None:
    log = run(new(), 6)
    changed = log[-2].genotypes.copy()
    changed[0, 0] = np.nextafter(changed[0, 0], 0.5)
    odd: Entries = [*log[:-2], Asked(changed), Told(changed, concave(changed))]
    one, other = new(), new()
    assert one.replay(odd) == len(log) - 2
    assert other.replay(odd) == len(log) - 2
    assert one.ask().tobytes() == other.ask().tobytes()


def test_points_are_told_in_any_portions(new: New) -> None:
    """A generation told in parts is learnt when it is complete."""
    whole, parts = new(), new()
    for _ in range(5):
        asked = whole.ask()
        assert parts.ask().tobytes() == asked.tobytes()
        fitness = concave(asked)
        whole.tell(asked, fitness)
        for some in (slice(0, 1), slice(1, 4), slice(4, SIZE)):
            parts.tell(asked[some], fitness[some])


def foreign(seed: int, edges: bool = False) -> tuple[Genotypes, Values]:
    """A generation that no optimizer asked for."""
    order = np.random.default_rng(seed)
    genotypes = order.random((SIZE, D))
    return (genotypes.round() if edges else genotypes), order.random(SIZE)


@pytest.mark.parametrize("edges", [False, True])
def test_other_genotypes_than_the_asked_ones_are_accepted(new: New, edges: bool) -> None:
    one, other = new(), new()
    for generation in range(10):
        for optimizer in (one, other):
            optimizer.ask()
            optimizer.tell(*foreign(generation, edges))
    asked = [optimizer.ask() for optimizer in (one, other)]
    assert asked[0].tobytes() == asked[1].tobytes()
    assert ((asked[0] >= 0) & (asked[0] <= 1)).all()


@pytest.mark.parametrize("name", MOVING)
def test_foreign_points_far_away_do_not_blow_the_step_size_up(name: str) -> None:
    optimizer = make(name, continuous(8), size=10)
    run(optimizer, 60)
    small = optimizer.step_size
    for seed in range(3):
        far = np.random.default_rng(seed).random((10, 8)).round()
        optimizer.tell(far, far[:, 0])
    assert small is not None
    assert optimizer.step_size is not None
    assert optimizer.step_size < 20 * small


# Nonsense


def test_telling_changes_neither_genotypes_nor_fitness(new: New) -> None:
    optimizer = new()
    optimizer.ask()
    genotypes, fitness = foreign(0)
    optimizer.tell(genotypes, fitness)
    assert np.array_equal(genotypes, foreign(0)[0])
    assert np.array_equal(fitness, foreign(0)[1])


def test_what_was_told_or_asked_can_be_overwritten_afterwards(new: New) -> None:
    reference = run(new(), 6)
    optimizer, log = new(), Entries()
    for _ in range(6):
        asked = optimizer.ask()
        log.append(Asked(asked.copy()))
        fitness = concave(asked)
        half = SIZE // 2
        optimizer.tell(asked[:half], fitness[:half])
        optimizer.tell(asked[half:], fitness[half:])
        asked[:], fitness[:] = 0.0, 0.0
    assert same(log, reference)


POINTS, FITNESS = foreign(0)
NAN, INF = np.full(SIZE, np.nan), np.full(SIZE, np.inf)
NONSENSE = {
    "one NaN fitness": (POINTS, np.where(np.arange(SIZE) == 2, NAN, FITNESS)),
    "one infinite fitness": (POINTS, np.where(np.arange(SIZE) == 0, INF, FITNESS)),
    "one minus infinite fitness": (POINTS, np.where(np.arange(SIZE) == 5, -INF, FITNESS)),
    "a NaN coordinate": (np.where(POINTS.max() > POINTS, POINTS, np.nan), FITNESS),
    "an infinite coordinate": (np.where(POINTS.max() > POINTS, POINTS, np.inf), FITNESS),
    "a coordinate above the cube": (np.where(POINTS.max() > POINTS, POINTS, 1.1), FITNESS),
    "a coordinate below the cube": (np.where(POINTS.max() > POINTS, POINTS, -0.1), FITNESS),
    "fitness too short": (POINTS, FITNESS[:-1]),
    "fitness too long": (POINTS, np.append(FITNESS, 0.0)),
    "genotypes too short": (POINTS[:-1], FITNESS),
    "nothing": (POINTS[:0], FITNESS[:0]),
    "a coordinate missing": (POINTS[:, :-1], FITNESS),
    "genotypes turned": (POINTS.T, FITNESS),
    "one genotype flat": (POINTS[0], FITNESS[:1]),
    "fitness as a column": (POINTS, FITNESS[:, None]),
    "two objectives": (POINTS, np.stack([FITNESS, FITNESS], axis=1)),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_and_leaves_no_trace(new: New, what: str) -> None:
    reference = run(new(), 3)
    optimizer = new()
    asked = optimizer.ask()
    with pytest.raises(ToldNonsense) as caught:
        optimizer.tell(*NONSENSE[what])
    assert "\n" not in str(caught.value)
    optimizer.tell(asked, concave(asked))
    assert same(run(optimizer, 2), reference[2:])


def test_a_very_bad_fitness_is_no_nonsense(new: New) -> None:
    optimizer = new()
    for _ in range(5):
        asked = optimizer.ask()
        optimizer.tell(asked, np.array([-1e12, *concave(asked)[1:]]))
    assert ((optimizer.ask() >= 0) & (optimizer.ask() <= 1)).all()


# Poor fitness


@pytest.mark.parametrize("level", [0.0, -1e9, 0.25])
def test_constant_fitness_does_not_stop_it(name: str, level: float) -> None:
    optimizer = make(name, suited(name))
    for _ in range(SLOW.get(name, 200)):
        assert optimizer.stop_reason() is None
        optimizer.tell(optimizer.ask(), np.full(SIZE, level))
    asked = optimizer.ask()
    assert ((asked >= 0) & (asked <= 1)).all()
    assert len(np.unique(asked, axis=0)) > 1


def test_quantised_fitness_does_not_stop_it(name: str) -> None:
    optimizer = make(name, continuous(D))
    for _ in range(SLOW.get(name, 60)):
        asked = optimizer.ask()
        optimizer.tell(asked, np.round(concave(asked)))
    assert optimizer.stop_reason() is None


def test_step_size_and_mean_are_in_units_of_the_cube(name: str) -> None:
    optimizer = make(name, suited(name))
    for _ in range(10):
        step_size, mean = optimizer.step_size, optimizer.mean()
        assert (step_size is None) == (name not in MOVING) == (mean is None)
        assert step_size is None or 0 < step_size < 1
        assert mean is None or (mean.shape == (len(suited(name)),))
        assert mean is None or ((mean >= 0) & (mean <= 1)).all()
        run(optimizer, 1)


# Several objectives


def two(genotypes: Genotypes) -> Values:
    """Nearness to 0.2 and to 0.8, everywhere: one can be had for the other."""
    nearness = [-((genotypes - optimum) ** 2).sum(axis=1) for optimum in (0.2, 0.8)]
    return np.stack(nearness, axis=1)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ONE_OBJECTIVE])
def test_several_objectives_are_told_and_replayed(name: str) -> None:
    first, resumed = (make(name, MIXED, objectives=2) for _ in range(2))
    log: Entries = []
    for _ in range(8):
        asked = first.ask()
        log += [Asked(asked), Told(asked, two(asked))]
        first.tell(asked, two(asked))
    assert resumed.replay(stored(log)) is None
    assert resumed.ask().tobytes() == first.ask().tobytes()
    with pytest.raises(ToldNonsense):
        first.tell(asked, concave(asked))


@pytest.mark.parametrize("name", ONE_OBJECTIVE)
def test_one_objective_only_is_refused_with_what_takes_more(name: str) -> None:
    with pytest.raises(JobError, match=f"{name} takes one objective, not 3: use nsga2 or tpe"):
        make(name, continuous(D), objectives=3)


def hypervolume(points: Values, reference: float = -4.0) -> float:
    """Of two objectives, above the reference in both."""
    best, area = reference, 0.0
    for one, other in sorted(points.tolist(), reverse=True):
        if one > reference and other > best:
            area += (one - reference) * (other - best)
            best = other
    return area


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nsga2", "tpe"])
def test_the_front_of_two_objectives_is_better_than_a_random_one(name: str) -> None:
    volumes = {}
    for searched in (name, "random"):
        optimizer = make(searched, continuous(12), size=12, objectives=2)
        seen = []
        for _ in range(10):
            asked = optimizer.ask()
            seen.append(two(asked))
            optimizer.tell(asked, seen[-1])
        volumes[searched] = hypervolume(np.concatenate(seen))
    assert volumes[name] > 1.1 * volumes["random"]


# Climbing


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "generations"), [("cma-es", 80), ("cma-es-margin", 120), ("lra-cma-es", 280)]
)
def test_cma_es_climbs_to_the_highest_fitness(name: str, generations: int, seed: int) -> None:
    optimizer = make(name, continuous(8), size=12, seed=seed)
    log = run(optimizer, generations)
    best = [entry.fitness.max() for entry in log if isinstance(entry, Told)]
    early, late = generations // 8, 3 * generations // 8
    assert best[0] < max(best[:early]) < max(best[early:late]) < max(best[late:]) <= 0
    assert optimizer.mean() == pytest.approx(OPTIMUM, abs=0.01)


@pytest.mark.parametrize("name", ["cma-es", "lra-cma-es", "cma-es-margin"])
def test_cma_es_finds_an_optimum_in_a_corner(name: str) -> None:
    optimizer = make(name, continuous(8), size=12)
    for _ in range(150):
        asked = optimizer.ask()
        optimizer.tell(asked, asked[:, :4].sum(axis=1) - asked[:, 4:].sum(axis=1))
    assert optimizer.mean() == pytest.approx([1.0] * 4 + [0.0] * 4, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_learning_rates_adapt_to_noise(seed: int) -> None:
    """Where noise is as large as the differences, LRA-CMA-ES comes nearer than CMA-ES."""
    distances = {}
    for name in ("lra-cma-es", "cma-es"):
        optimizer = make(name, continuous(16), size=12, seed=seed)
        noise = np.random.default_rng(seed)
        for _ in range(250):
            asked = optimizer.ask()
            optimizer.tell(asked, concave(asked) + noise.normal(size=12))
        distances[name] = -concave(optimizer.mean()[None])[0]
    assert distances["lra-cma-es"] < distances["cma-es"]


def mixed(genotypes: Genotypes) -> Values:
    """Highest at depth 3, method 0, copies 7, rescale on, scale and density at OPTIMUM."""
    best = (placed(3, 4), placed(7, 9))
    ordered = -abs(genotypes[:, [1, 3]] - best).sum(axis=1)
    names = -1.0 * (genotypes[:, 2] != placed(0, 3)) - 0.5 * (genotypes[:, 4] != placed(1, 2))
    return np.asarray(concave(genotypes[:, [0, 5]]) + ordered + names)


@pytest.mark.parametrize("seed", range(3))
def test_choices_and_continuous_coordinates_are_climbed_together(seed: int) -> None:
    optimizer = make("cma-es-margin", MIXED, size=12, seed=seed)
    for _ in range(80):
        asked = optimizer.ask()
        optimizer.tell(asked, mixed(asked))
    expected = [OPTIMUM, placed(3, 4), placed(0, 3), placed(7, 9), placed(1, 2), OPTIMUM]
    assert optimizer.mean() == pytest.approx(expected, abs=0.05)


def test_few_ordered_choices_beside_many_stay_possible() -> None:
    """That fewer values are in one row of thresholds does not shut its lower choices off."""
    coordinates = (
        Coordinate("few", placed(2, 3), choices=3),
        Coordinate("many", placed(5, 12), choices=12),
    )
    optimizer = make("cma-es-margin", coordinates, size=8)
    for _ in range(60):
        asked = optimizer.ask()
        optimizer.tell(asked, asked.sum(axis=1))  # the last choice of each
    late = np.concatenate([optimizer.ask() for _ in range(40)])
    assert (late[:, 0] < 0.8).mean() > 0.03
    assert optimizer.mean() == pytest.approx([placed(2, 3), placed(11, 12)])


def test_a_start_among_choices_is_proposed_more_often_than_others() -> None:
    asked = make("cma-es-margin", MIXED, size=400).ask()
    counts = [int((asked[:, 2] == placed(i, 3)).sum()) for i in range(3)]
    assert counts[2] > 200 > 100 > max(counts[:2]) > min(counts[:2]) > 30


@pytest.mark.slow
@pytest.mark.parametrize(("name", "generations"), [("tpe", 8), ("nsga2", 16)])
def test_it_finds_better_points_than_random_search(name: str, generations: int) -> None:
    best: dict[str, list[float]] = {name: [], "random": []}
    for searched, found in best.items():
        for seed in range(3):
            log = run(make(searched, continuous(6), size=10, seed=seed), generations)
            found.append(max(entry.fitness.max() for entry in log if isinstance(entry, Told)))
    assert np.mean(best[name]) > 0.7 * np.mean(best["random"])


def test_quasi_random_points_leave_fewer_gaps_than_random_ones() -> None:
    """Of 16 points, each sixteenth of each side holds one: no random sample does that."""
    asked = make("qmc", continuous(4), size=16).ask()
    for side in (asked * 16).astype(int).T:
        assert sorted(side) == list(range(16))


def test_random_search_is_uniform() -> None:
    asked = make("random", continuous(3, start=0.9), size=2000).ask()
    assert asked.mean(axis=0) == pytest.approx(0.5, abs=0.03)
    assert asked.std(axis=0) == pytest.approx(12**-0.5, abs=0.01)


def test_an_inactive_coordinate_stands_at_its_start_for_tpe() -> None:
    starts = np.array([coordinate.start for coordinate in CONDITIONAL])
    log = run(make("tpe", CONDITIONAL, size=10), 6)
    asked = np.concatenate([entry.genotypes for entry in log if isinstance(entry, Asked)])
    matters = np.array([active(genotype, CONDITIONAL) for genotype in asked])
    assert 0.1 < matters.mean() < 0.9
    assert (asked[~matters] == np.broadcast_to(starts, asked.shape)[~matters]).all()


# Starting and stopping


@pytest.mark.parametrize("name", MOVING)
def test_cma_es_starts_where_the_space_says(name: str) -> None:
    assert make(name, continuous(8)).mean() == pytest.approx(0.3)


def test_the_mean_of_a_mixed_space_starts_at_its_start() -> None:
    starts = [coordinate.start for coordinate in MIXED]
    assert make("cma-es-margin", MIXED).mean() == pytest.approx(starts)


@pytest.mark.parametrize("name", MOVING)
def test_cma_es_stops_when_its_steps_no_longer_change_a_merge(name: str) -> None:
    optimizer = make(name, continuous(2), size=12)
    for _ in range(600):
        if optimizer.stop_reason() is not None:
            break
        run(optimizer, 1)
    reason = optimizer.stop_reason()
    assert reason is not None
    assert reason.startswith("the optimizer converged (")
    assert optimizer.step_size is not None
    assert 1e-7 < optimizer.step_size < 1e-3


@pytest.mark.parametrize("restarts", [1, 2])
def test_restarts_double_the_population_and_are_replayed(restarts: int) -> None:
    section = Section(name="cma-es", population=4, restarts=restarts)
    optimizer, resumed = (build(section, continuous(2), 0.15, 1) for _ in range(2))
    log: Entries = []
    sizes = []
    while optimizer.stop_reason() is None:
        sizes.append(optimizer.size)
        log += run(optimizer, 1)
    assert [size for size, _ in groupby(sizes)] == [4 * 2**i for i in range(restarts + 1)]
    middle = 2 * sizes.index(8) + 6
    assert resumed.replay(log[:middle]) is None
    assert same(run(resumed, len(log[middle:]) // 2), log[middle:])
    assert resumed.stop_reason() == optimizer.stop_reason()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cma-es"])
def test_restarts_of_what_does_not_converge_are_refused(name: str) -> None:
    with pytest.raises(JobError, match=f"restarts: 2 is for cma-es, and the optimizer is {name}"):
        build(Section(name=name, restarts=2), continuous(D), 0.15, 1)


@pytest.mark.parametrize(("section", "expected"), [({}, 0.15), ({"sigma0": 0.25}, 0.25)])
@pytest.mark.parametrize("name", MOVING)
def test_sigma0_of_the_job_wins_over_the_spaces(
    name: str, section: dict[str, float], expected: float
) -> None:
    optimizer = build(Section(name=name, **section), continuous(8), 0.15, 1)
    assert optimizer.step_size == pytest.approx(expected, rel=1e-3)


# Choosing


@pytest.mark.parametrize("name", ["lra-cma-es", "cma-es-margin"])
def test_a_population_too_small_to_learn_from_is_refused(name: str) -> None:
    with pytest.raises(JobError, match=f"3 is too few to learn from for {name}: give 4 or more"):
        make(name, continuous(D), size=3)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("lra-cma-es", "cma-es-margin")])
def test_a_population_of_two_is_enough_for_the_others(name: str) -> None:
    for entry in run(make(name, continuous(D), size=2), 6):
        assert entry.genotypes.shape == (2, D)


@pytest.mark.parametrize("name", CONTINUOUS_ONLY)
def test_a_single_dimension_and_choices_are_refused_with_what_takes_them(name: str) -> None:
    with pytest.raises(JobError, match=f"{name} needs 2 dimensions or more: use tpe or random"):
        make(name, continuous(1))
    with pytest.raises(JobError, match="choices of 'depth': use cma-es-margin or tpe"):
        make(name, MIXED)


@pytest.mark.parametrize(
    ("coordinates", "objectives", "noisy", "name", "reason"),
    [
        (continuous(24), 1, False, "cma-es", "24 continuous"),
        (continuous(24), 1, True, "lra-cma-es", "noisy"),
        (continuous(1), 1, True, "tpe", "2 dimensions"),
        (continuous(24), 2, True, "nsga2", "2 objectives"),
        (MIXED, 1, True, "cma-es-margin", "4 of 6 coordinates"),
        (CONDITIONAL, 1, False, "tpe", "only where"),
        (CONDITIONAL, 2, False, "nsga2", "2 objectives"),
    ],
)
def test_auto_picks_by_the_search_and_says_why(
    coordinates: tuple[Coordinate, ...], objectives: int, noisy: bool, name: str, reason: str
) -> None:
    found = choose(Section(), coordinates, objectives, noisy)
    assert found.name == name
    assert reason in found.reason
    one, other = (
        build(section, coordinates, 0.15, 1, objectives, noisy)
        for section in (Section(), Section(name=name))
    )
    assert one.ask().tobytes() == other.ask().tobytes()


def test_a_named_optimizer_is_not_overruled(name: str) -> None:
    found = choose(Section(name=name), MIXED, 2, True)
    assert replace(found, reason="") == replace(found, name=name, reason="")
    assert "names it" in found.reason


@pytest.mark.parametrize(("d", "size"), [(1, 4), (2, 6), (10, 10), (24, 13), (224, 20)])
def test_an_automatic_population_grows_with_the_dimensions(name: str, d: int, size: int) -> None:
    expected = 2 * size if name == "nsga2" else size  # 4 + floor(3 ln d)
    assert population(Section(), name, d) == expected
    assert population(Section(population=7), name, d) == 7
    if not (d == 1 and name in CONTINUOUS_ONLY):
        assert build(Section(name=name), continuous(d), 0.15, 1).size == expected


# Manners


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_optuna_says_nothing_and_is_left_as_it_was(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    filters = list(warnings.filters)
    try:
        with caplog.at_level(logging.DEBUG):
            run(make(name, CONDITIONAL), 4)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)
    assert warnings.filters == filters
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
