"""What is drawn: exactly the shares that temperature and top_p leave."""

import numpy as np
import pytest
import torch

from evomerge.engine import Generation
from evomerge.engine.sampling import Stopped, drawn, uniforms
from evomerge.engine.texts import Texts
from tests import tiny

SHARES = np.array([0.05, 0.4, 0.0, 0.3, 0.25])
LOGITS = torch.from_numpy(np.log(np.maximum(SHARES, 1e-300)))


def found(temperature: float, top_p: float, count: int = 20_000) -> list[float]:
    """How often each token is drawn, over evenly spread numbers."""
    draws = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    tokens = drawn(LOGITS.float().expand(count, -1), draws, temperature, top_p)
    assert tokens.shape == (count, 1)
    return (np.bincount(tokens[:, 0].numpy(), minlength=5) / count).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_their_shares(temperature: float) -> None:
    sharpened = SHARES ** (1 / temperature)
    expected = (sharpened / sharpened.sum()).tolist()
    assert found(temperature, 1.0) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.94, [1, 3, 4])]
)
def test_only_the_likeliest_tokens_that_reach_top_p_are_drawn(
    top_p: float, kept: list[int]
) -> None:
    expected = np.where(np.isin(np.arange(5), kept), SHARES, 0)
    assert found(1.0, top_p) == pytest.approx((expected / expected.sum()).tolist(), abs=2e-4)


def test_the_ends_of_the_range_draw_tokens_that_can_be_drawn() -> None:
    draws = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    assert drawn(logits, draws, 1.0, 0.9).tolist() == [[1], [2]]


def test_the_numbers_of_a_row_are_its_own() -> None:
    how = Generation(4, temperature=1.0, seed=7)
    rows = [("a", 0), ("a", 1), ("b", 0)]
    numbers = uniforms(how, rows, 6)
    assert numbers.shape == (3, 6)
    assert len(set(numbers.flatten().tolist())) == 18
    assert uniforms(how, rows[::-1], 4).equal(numbers.flip(0)[:, :4])
    assert not set(uniforms(Generation(4, seed=8), rows, 6).flatten().tolist()) & set(
        numbers.flatten().tolist()
    )
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_rows_that_have_written_a_stop_text_are_ended_within_sixteen_tokens() -> None:
    texts = Texts(tiny.ZOO / "base", "base")
    five = texts.tokenizer.convert_tokens_to_ids("五")
    one, width = texts.tokenizer.convert_tokens_to_ids("一"), 2
    rows = torch.full((3, width + 40), one)
    rows[:, :width] = five  # of the prompts, where nothing is looked for
    rows[1, width + 20] = five
    stopped = Stopped(texts, ("五", "nowhere"), width)
    ended = {steps: stopped(rows[:, : width + steps], None).tolist() for steps in range(1, 41)}
    assert ended[20] == [False, False, False]
    assert ended[32] == ended[40] == [False, True, False]
