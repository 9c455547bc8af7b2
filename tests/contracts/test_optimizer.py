"""What every optimizer keeps to: the cube, replay, and refusal of nonsense."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.errors import JobError
from evomerge.job import Optimizer as Section
from evomerge.optimizer import Genotypes, Optimizer, ToldNonsense, build, population

SIZE, D = 6, 5
OPTIMUM = 0.7
Values = NDArray[np.float64]
History = list[tuple[Genotypes, Values]]
New = Callable[..., Optimizer]


@pytest.fixture(params=get_args(Section.model_fields["name"].annotation))
def new(request: pytest.FixtureRequest) -> New:
    """Makes an optimizer of each kind."""

    def make(d: int = D, size: int = SIZE, seed: int = 1, start: float = 0.3) -> Optimizer:
        section = Section(name=request.param, population=size)
        return build(section, np.full(d, start), 0.15, seed)

    return make


def cma(size: int = 12, d: int = 8, seed: int = 1, **section: Any) -> Optimizer:
    return build(Section(name="cma-es", population=size, **section), np.full(d, 0.3), 0.15, seed)


def concave(genotypes: Genotypes) -> Values:
    """Highest, 0, where every coordinate is OPTIMUM."""
    return np.asarray(-((genotypes - OPTIMUM) ** 2).sum(axis=1))


def run(optimizer: Optimizer, generations: int) -> History:
    history = []
    for _ in range(generations):
        asked = optimizer.ask()
        fitness = concave(asked)
        history.append((asked.copy(), fitness))
        optimizer.tell(asked, fitness)
    return history


def same(one: History, other: History) -> bool:
    """Bit for bit."""
    return [a.tobytes() for a, _ in one] == [a.tobytes() for a, _ in other]


@pytest.mark.parametrize(("d", "size"), [(2, 2), (2, 6), (24, 13)])
@pytest.mark.parametrize("start", [0.0, 0.3, 1.0])
def test_asks_are_a_population_of_points_in_the_cube(
    new: New, d: int, size: int, start: float
) -> None:
    for asked, _ in run(new(d, size, start=start), 20):
        assert asked.shape == (size, d)
        assert asked.dtype == np.float64
        assert ((asked >= 0) & (asked <= 1)).all()


def test_a_generation_is_not_one_point_many_times(new: New) -> None:
    asked = new().ask()
    assert len(np.unique(asked, axis=0)) == SIZE


def test_equal_seeds_and_tells_give_bit_identical_proposals(new: New) -> None:
    assert same(run(new(d=30, size=8), 30), run(new(d=30, size=8), 30))


def test_other_seeds_give_other_proposals(new: New) -> None:
    assert not same(run(new(seed=1), 1), run(new(seed=2), 1))


def test_numpys_global_generator_changes_nothing_and_is_not_moved(new: New) -> None:
    reference = run(new(), 10)
    np.random.seed(3)  # noqa: NPY002 the global generator is the subject
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    optimizer = new()
    first = run(optimizer, 5)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    np.random.seed(4)  # noqa: NPY002
    np.random.random(100)  # noqa: NPY002
    assert same(first + run(optimizer, 5), reference)


def test_two_optimizers_at_once_do_not_disturb_each_other(new: New) -> None:
    reference = run(new(), 10)
    one, other = new(), new(seed=9)
    taken_in_turns: History = []
    for _ in range(10):
        taken_in_turns += run(one, 1)
        run(other, 1)
    assert same(taken_in_turns, reference)


@pytest.mark.parametrize("told", [1, 7, 25])
def test_a_replayed_history_goes_on_bit_identically(new: New, told: int) -> None:
    whole = run(new(), 40)
    resumed = new()
    for genotypes, fitness in whole[:told]:
        stored = np.frombuffer(genotypes.tobytes()).reshape(genotypes.shape)  # read-only
        assert resumed.ask().tobytes() == stored.tobytes()
        resumed.tell(stored, np.frombuffer(fitness.tobytes()))
    assert same(run(resumed, 40 - told), whole[told:])


def foreign(seed: int, edges: bool = False) -> tuple[Genotypes, Values]:
    """A generation that no optimizer asked for."""
    random = np.random.default_rng(seed)
    genotypes = random.random((SIZE, D))
    return (genotypes.round() if edges else genotypes), random.random(SIZE)


@pytest.mark.parametrize("edges", [False, True])
def test_other_genotypes_than_the_asked_ones_are_accepted(new: New, edges: bool) -> None:
    one, other = new(), new()
    for generation in range(10):
        for optimizer in (one, other):
            optimizer.ask()
            optimizer.tell(*foreign(generation, edges))
    proposals = [optimizer.ask() for optimizer in (one, other)]
    assert proposals[0].tobytes() == proposals[1].tobytes()
    assert ((proposals[0] >= 0) & (proposals[0] <= 1)).all()


def test_telling_changes_neither_genotypes_nor_fitness(new: New) -> None:
    optimizer = new()
    optimizer.ask()
    genotypes, fitness = foreign(0)
    optimizer.tell(genotypes, fitness)
    assert np.array_equal(genotypes, foreign(0)[0])
    assert np.array_equal(fitness, foreign(0)[1])


POINTS, FITNESS = foreign(0)
NAN, INF = np.full(SIZE, np.nan), np.full(SIZE, np.inf)
NONSENSE = {
    "one NaN fitness": (POINTS, np.where(np.arange(SIZE) == 2, NAN, FITNESS)),
    "one infinite fitness": (POINTS, np.where(np.arange(SIZE) == 0, INF, FITNESS)),
    "one minus infinite fitness": (POINTS, np.where(np.arange(SIZE) == 5, -INF, FITNESS)),
    "a NaN coordinate": (np.where(POINTS.max() > POINTS, POINTS, np.nan), FITNESS),
    "an infinite coordinate": (np.where(POINTS.max() > POINTS, POINTS, np.inf), FITNESS),
    "fitness too short": (POINTS, FITNESS[:-1]),
    "fitness too long": (POINTS, np.append(FITNESS, 0.0)),
    "genotypes too short": (POINTS[:-1], FITNESS),
    "both too short": (POINTS[:-1], FITNESS[:-1]),
    "both too long": (np.tile(POINTS, (2, 1)), np.tile(FITNESS, 2)),
    "nothing": (POINTS[:0], FITNESS[:0]),
    "a coordinate missing": (POINTS[:, :-1], FITNESS),
    "genotypes turned": (POINTS.T, FITNESS),
    "one genotype flat": (POINTS[0], FITNESS[:1]),
    "fitness as a column": (POINTS, FITNESS[:, None]),
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
    assert same(run(optimizer, 2), reference[1:])


def test_a_very_bad_fitness_is_no_nonsense(new: New) -> None:
    optimizer = new()
    for _ in range(5):
        asked = optimizer.ask()
        optimizer.tell(asked, np.array([-1e12, *concave(asked)[1:]]))
    assert ((optimizer.ask() >= 0) & (optimizer.ask() <= 1)).all()


@pytest.mark.parametrize("level", [0.0, -1e9, 0.25])
def test_constant_fitness_does_not_stop_it(new: New, level: float) -> None:
    optimizer = new()
    for _ in range(200):
        assert optimizer.stop_reason() is None
        optimizer.tell(optimizer.ask(), np.full(SIZE, level))
    assert len(np.unique(optimizer.ask(), axis=0)) == SIZE


def test_quantised_fitness_does_not_stop_it(new: New) -> None:
    optimizer = new()
    for _ in range(60):
        asked = optimizer.ask()
        optimizer.tell(asked, np.round(concave(asked)))
    assert optimizer.stop_reason() is None


def test_step_size_and_mean_are_in_units_of_the_cube(new: New) -> None:
    optimizer = new()
    for _ in range(10):
        assert 0 < optimizer.step_size < 1
        mean = optimizer.mean()
        assert mean is None or (mean.shape == (D,) and ((mean >= 0) & (mean <= 1)).all())
        run(optimizer, 1)


@pytest.mark.parametrize("seed", range(3))
def test_cma_es_climbs_to_the_highest_fitness(seed: int) -> None:
    optimizer = cma(seed=seed)
    history = run(optimizer, 80)
    best = [fitness.max() for _, fitness in history]
    assert best[0] < max(best[:10]) < max(best[10:30]) < max(best[30:]) <= 0
    mean = optimizer.mean()
    assert mean is not None
    assert mean == pytest.approx(OPTIMUM, abs=0.01)


def test_cma_es_finds_an_optimum_in_a_corner() -> None:
    optimizer = cma()
    for _ in range(80):
        asked = optimizer.ask()
        optimizer.tell(asked, asked[:, :4].sum(axis=1) - asked[:, 4:].sum(axis=1))
    mean = optimizer.mean()
    assert mean is not None
    assert mean == pytest.approx([1.0] * 4 + [0.0] * 4, abs=0.05)


def test_cma_es_starts_where_the_space_says() -> None:
    mean = cma().mean()
    assert mean is not None
    assert mean == pytest.approx(0.3)


def test_cma_es_stops_when_its_steps_no_longer_change_a_merge() -> None:
    optimizer = cma(size=12, d=2)
    while optimizer.stop_reason() is None:
        assert optimizer.step_size > 1e-6
        run(optimizer, 1)
    assert optimizer.stop_reason() == "the optimizer converged (tolx)"
    assert optimizer.step_size < 1e-3


@pytest.mark.parametrize(("section", "expected"), [({}, 0.15), ({"sigma0": 0.25}, 0.25)])
def test_sigma0_of_the_job_wins_over_the_spaces(section: dict[str, float], expected: float) -> None:
    assert cma(**section).step_size == pytest.approx(expected, rel=1e-3)


def test_cma_es_refuses_a_single_dimension_and_names_what_takes_it() -> None:
    with pytest.raises(JobError, match="cma-es needs 2 dimensions or more: use random"):
        cma(d=1)
    assert build(Section(name="random"), np.full(1, 0.5), 0.1, 0).ask().shape == (4, 1)


def test_random_search_is_uniform_and_has_no_mean() -> None:
    optimizer = build(Section(name="random", population=2000), np.full(3, 0.9), 0.1, 0)
    asked = optimizer.ask()
    assert asked.mean(axis=0) == pytest.approx(0.5, abs=0.03)
    assert asked.std(axis=0) == pytest.approx(optimizer.step_size, abs=0.01)
    assert optimizer.mean() is None


@pytest.mark.parametrize(("d", "size"), [(1, 4), (2, 6), (10, 10), (24, 13), (224, 20)])
def test_an_automatic_population_grows_with_the_dimensions(d: int, size: int) -> None:
    assert population(Section(), d) == size  # 4 + floor(3 ln d)
    assert population(Section(population=7), d) == 7
