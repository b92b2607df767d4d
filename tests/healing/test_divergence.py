"""The loss of healing is the divergence that its formula says."""

import pytest
import torch
from torch.nn.functional import kl_div

from flapcli.evaluation.perplexity import loss_sums
from flapcli.execution import head
from flapcli.execution.divergence import Likeliest, divergence, state_loss, token_losses

DENSE, PRUNED = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)).mul(3).unbind()
FULL = kl_div(PRUNED.log_softmax(-1), DENSE.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def test_with_the_whole_vocabulary_it_is_the_full_divergence():
    for teacher in (Likeliest.of(DENSE), Likeliest.of(DENSE, 40), Likeliest.of(DENSE, 1000)):
        torch.testing.assert_close(divergence(PRUNED, teacher), FULL)


def test_what_is_left_out_counts_as_one_more_token():
    k = 7
    found, order = divergence(PRUNED, Likeliest.of(DENSE, k)), DENSE.argsort(-1, descending=True)
    lumped = []
    for logits in (PRUNED, DENSE):
        p = logits.softmax(-1).gather(-1, order)
        lumped.append(torch.cat([p[:, :k], p[:, k:].sum(-1, keepdim=True)], -1).log())
    torch.testing.assert_close(found, kl_div(*lumped, reduction="none", log_target=True).sum(-1))
    assert (found < FULL).all()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_that_a_cache_holds_say_what_all_rows_say(rows, monkeypatch):
    ids = torch.arange(6)[None]
    logits = torch.cat([PRUNED, PRUNED[:1]])[None]
    whole, sums = Likeliest.of(DENSE, 7), loss_sums(logits, ids, 1)
    monkeypatch.setattr(head, "CACHED", rows * 40 + 39)
    assert next(part.stop - part.start for part in head.cached_rows(DENSE)) == rows
    for found, wanted in zip(vars(Likeliest.of(DENSE, 7)).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(found, wanted)
    assert loss_sums(logits, ids, 1) == pytest.approx(sums, rel=1e-6)


def test_its_gradient_is_that_of_the_formula():
    def lumped(logits: torch.Tensor) -> torch.Tensor:
        q, ids = logits.log_softmax(-1), teacher.ids
        rest = q.scatter(-1, ids, -torch.inf).logsumexp(-1)
        p = torch.cat([teacher.logprobs, teacher.rest[:, None]], -1)
        return (p.exp() * (p - torch.cat([q.gather(-1, ids), rest[:, None]], -1))).sum()

    of = Likeliest.of(DENSE, 7)
    teacher = Likeliest(of.logprobs.half().float(), of.ids, of.rest)  # as it is kept: not quite a distribution
    logits = PRUNED.clone().requires_grad_()
    found, wanted = (torch.autograd.grad(value, logits)[0] for value in (
        (3 * divergence(logits, teacher)).sum(), 3 * lumped(logits)
    ))  # fmt: skip
    torch.testing.assert_close(found, wanted)


def test_a_student_that_says_the_same_learns_nothing():
    logits = DENSE.clone().requires_grad_()
    loss = divergence(logits, Likeliest.of(DENSE, 7)).sum()
    assert abs(loss.item()) < 1e-5
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


def test_tokens_that_the_teacher_rules_out_are_no_nan():
    ruled_out = DENSE.clone()
    ruled_out[:, 5:] = -torch.inf
    for k in (None, 3, 8, 40):
        logits = PRUNED.clone().requires_grad_()
        loss = divergence(logits, Likeliest.of(ruled_out, k)).sum()
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_both_losses_are_the_mean_of_each():
    ids, teacher = torch.arange(5), Likeliest.of(DENSE, 7)
    kl, ce, both = (token_losses(PRUNED, ids, teacher, loss) for loss in ("kl", "ce", "kl+ce"))
    torch.testing.assert_close(both, (kl + ce) / 2)
    torch.testing.assert_close(ce, -PRUNED.log_softmax(-1)[torch.arange(5), ids])


def test_hidden_states_are_measured_by_the_teachers_own_size():
    student = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert state_loss(student, torch.tensor([[0.0, 5.0], [0.0, 1.0]])).item() == pytest.approx((9 + 1) / 25 + 1)
