"""Against transformers, where it is installed, and against formulas written another way."""

import math

import pytest
import torch

from qtrain.model.sampling import Sampling, penalized


def naive_penalty(row, tokens, penalty):
    """One logit after the other, as the article's equation has them."""
    return [
        value
        if index not in tokens
        else value / penalty
        if value >= 0
        else value * penalty
        for index, value in enumerate(row)
    ]


def naive_nucleus(row, p):
    """The smallest set of tokens, from the likeliest on, whose probability reaches p."""
    total = math.fsum(map(math.exp, row))
    kept, sum_ = set(), 0.0
    for index in sorted(range(len(row)), key=lambda index: -row[index]):
        if sum_ >= p:
            break
        kept.add(index)
        sum_ += math.exp(row[index]) / total
    return kept


def drawn(logits, **settings):
    """Returns how often each token comes in 20,000 draws."""
    generator = torch.Generator().manual_seed(0)
    before = [torch.zeros(20_000, 1, dtype=torch.long)]
    tokens = Sampling(**settings).choose(logits.expand(20_000, -1), before, generator)
    return torch.bincount(tokens.flatten(), minlength=logits.shape[-1]) / 20_000


@pytest.fixture
def logits():
    return 2 * torch.randn(1, 12)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_is_penalized_once_whatever_the_sign(logits, penalty):
    tokens = torch.tensor([[3, 3, 0, 7]])
    expected = naive_penalty(logits[0].tolist(), {3, 0, 7}, penalty)
    torch.testing.assert_close(
        penalized(logits, tokens, penalty)[0].tolist(), expected
    )
    later = Sampling(greedy=True, repetition_penalty=penalty).choose(
        logits, [tokens[:, :2], tokens[:, 2:]], None
    )
    assert later.item() == max(range(12), key=lambda index: expected[index])


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.7, 0.95, 1.0])
def test_top_p_draws_from_the_nucleus_alone_in_proportion(logits, p, top_k):
    row = logits[0].tolist()
    likeliest = sorted(range(12), key=lambda index: -row[index])[: top_k or 12]
    allowed = {
        likeliest[index]
        for index in naive_nucleus([row[token] for token in likeliest], p)
    }
    weights = torch.tensor(
        [
            math.exp(value) if index in allowed else 0.0
            for index, value in enumerate(row)
        ]
    )
    expected = weights / weights.sum()
    found = drawn(logits, top_p=p, top_k=top_k)
    assert (found[expected == 0] == 0).all()
    # 5 deviations of 20,000 draws
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_each_row_has_its_own_nucleus_and_its_own_past():
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    past = [torch.tensor([[0], [1]])]
    generator = torch.Generator().manual_seed(0)
    assert Sampling(top_p=0.5).choose(logits, past, generator).tolist() == [[0], [2]]
    chosen = Sampling(greedy=True, repetition_penalty=100.0).choose(
        logits + 0.1, past, generator
    )
    assert chosen[0, 0] != 0 and chosen[1, 0] == 2


def test_processors_of_transformers_say_the_same(logits):
    theirs = pytest.importorskip("transformers", reason="needs the extra hf")
    tokens = torch.tensor([[3, 3, 0, 7]])
    wanted = theirs.RepetitionPenaltyLogitsProcessor(1.3)(tokens, logits.clone())
    torch.testing.assert_close(penalized(logits, tokens, 1.3), wanted)
    for p in (0.3, 0.7, 0.95):
        wanted = theirs.TopPLogitsWarper(p)(
            tokens, theirs.TemperatureLogitsWarper(0.8)(tokens, logits)
        )
        found = drawn(logits, top_p=p, temperature=0.8)
        torch.testing.assert_close(found, wanted[0].softmax(-1), atol=0.02, rtol=0)
        assert (found[wanted[0].isinf()] == 0).all()
