"""Drawing tokens: the right distribution, and a row's draws its own."""

import math

import pytest
import torch
from torch import Tensor

from app.engine.personaplex.model.sampling import Luck, draw, gumbel


def draws(logits: Tensor, temperature: float, top_k: int, count: int, seed: int = 7) -> Tensor:
    """`count` draws [count] from one row of logits, each with the next number of draws made."""
    rows = logits.expand(count, -1)
    noise = gumbel(torch.full((count,), seed), torch.arange(count), 0, 1, min(top_k, len(logits)))
    return draw(rows, Luck.of(noise, torch.full((count,), temperature), torch.full((count,), top_k)), 0)


def chi_square_over_degrees(found: Tensor, expected: Tensor) -> float:
    """Of counts, cells with few expected pooled into one."""
    rare = expected < 10
    cells = [(found[~rare], expected[~rare])]
    if rare.any() and expected[rare].sum() > 10:
        cells.append((found[rare].sum()[None], expected[rare].sum()[None]))
    seen, due = (torch.cat(parts) for parts in zip(*cells, strict=True))
    return float(((seen - due) ** 2 / due).sum() / (len(due) - 1))


@pytest.mark.parametrize(("temperature", "top_k", "vocabulary"), [(0.8, 250, 2048), (0.7, 25, 500), (1.5, 64, 64)])
def test_draws_follow_softmax_over_the_top_k(temperature: float, top_k: int, vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 2
    count = 40_000

    found = torch.bincount(draws(logits, temperature, top_k, count), minlength=vocabulary).double()

    likely = torch.softmax(logits.double() / temperature, 0)
    kept = torch.zeros_like(likely).scatter(0, likely.topk(top_k).indices, 1.0) * likely
    expected = kept / kept.sum() * count
    assert found[kept == 0].sum() == 0
    cells = int((expected >= 10).sum())
    assert abs(chi_square_over_degrees(found, expected) - 1) < 5 * math.sqrt(2 / cells)


def test_successive_draws_and_codebooks_are_independent() -> None:
    noise = gumbel(torch.tensor([5]).expand(4000), torch.arange(4000), 0, 9, 3).flatten(1)
    correlation = torch.corrcoef(noise.T)
    off = correlation - torch.eye(len(correlation))
    lagged = torch.corrcoef(torch.stack((noise[1:, 0], noise[:-1, 0])))[0, 1]

    assert off.abs().max() < 5 / math.sqrt(4000)
    assert lagged.abs() < 5 / math.sqrt(4000)
    assert noise.isfinite().all()


def test_neighbouring_seeds_share_nothing() -> None:
    noise = gumbel(torch.arange(2), torch.zeros(2, dtype=torch.int64), 0, 1, 4000)[:, 0]

    assert torch.corrcoef(noise)[0, 1].abs() < 5 / math.sqrt(4000)


def test_a_row_draws_the_same_whoever_shares_its_batch() -> None:
    """Other rows have other seeds, temperatures and a larger top-k."""
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    for n, row in enumerate(logits):
        noise = gumbel(torch.tensor([9]), torch.tensor([n]), 4, 2, 20)
        alone = draw(row[None], Luck.of(noise, torch.tensor([0.8]), torch.tensor([20])), 1)
        others = torch.randn(3, 300)
        seeds, drawn = torch.tensor([1, 2, 9, 4]), torch.tensor([n * 3, 5, n, 0])
        luck = Luck.of(
            gumbel(seeds, drawn, 4, 2, 300), torch.tensor([0.0, 1.3, 0.8, 2.0]), torch.tensor([1, 300, 20, 100])
        )
        together = draw(torch.stack((others[0], others[1], row, others[2])), luck, 1)
        assert together[2] == alone[0]


def test_a_temperature_of_zero_takes_the_likeliest_beside_rows_that_do_not() -> None:
    logits = torch.randn(64, 100)
    cold = torch.arange(64) % 2 == 0
    temperature = torch.where(cold, 0.0, 1.0)

    noise = gumbel(torch.arange(64), torch.arange(64), 0, 1, 50)
    drawn = draw(logits, Luck.of(noise, temperature, torch.full((64,), 50)), 0)

    assert torch.equal(drawn[cold], logits.argmax(1)[cold])
    assert not torch.equal(drawn[~cold], logits.argmax(1)[~cold])


def test_half_precision_logits_are_drawn_from_in_full() -> None:
    logits = torch.tensor([[1.0, 1.001, 1.002]]).to(torch.float16).expand(3000, -1)

    noise = gumbel(torch.full((3000,), 2), torch.arange(3000), 0, 1, 3)
    drawn = draw(logits, Luck.of(noise, torch.ones(3000), torch.full((3000,), 3)), 0)

    assert torch.bincount(drawn, minlength=3).min() > 850
