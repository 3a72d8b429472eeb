"""What must hold for every registered objective, and for the losses under them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clmae.curriculum import curricula, make_curriculum
from clmae.losses import hidden_mean, ratio_kl_mean, samenesses, soft_reconstructions, undecided
from clmae.mae import build_mae
from clmae.masker import attend, relaxations
from clmae.masking import Draw
from clmae.objectives import make_objective, objectives, view

everyone = pytest.mark.parametrize("name", sorted(objectives))
SMALL = {"width": 32, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
SHAPES = {
    "square": (16, 4, 3),
    "one channel": (16, 4, 1),
    "four channels": (16, 4, 4),
    "wide": ((8, 24), (4, 6), 3),
}


def make(name, shape="square", seed=0, **settings_):
    torch.manual_seed(seed)
    extra = {"masker": {"depth": 1, "heads": 2}} if "cl_" in name else {}
    return make_objective(build_mae(*SHAPES[shape], **SMALL), name, **extra, **settings_)


def images_for(objective, b=4):
    encoder = objective.encoder
    return torch.randn(b, encoder.channels, *encoder.image_size, generator=torch.Generator().manual_seed(1))


@everyone
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("b", [1, 3])
def test_a_phase_moves_only_its_own_net(name, shape, b):
    objective = make(name, shape)
    images = images_for(objective, b)
    for phase in objective.phases(0):
        before = {
            net: [p.detach().clone() for p in module.parameters()] for net, module in objective.nets.items()
        }
        optimizers = {
            net: torch.optim.SGD(module.parameters(), lr=0.1) for net, module in objective.nets.items()
        }
        objective.zero_grad()
        objective.loss(phase, images, 0.25, Draw(seed=(0,))).total.backward()
        for optimizer in optimizers.values():  # every optimizer may step: only one net has a gradient
            optimizer.step()
        for net, module in objective.nets.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[net], module.parameters()))
            assert moved == (net == phase), (phase, net)


@everyone
def test_nets_share_no_parameter_and_cover_all(name):
    objective = make(name)
    ids = [id(p) for net in objective.nets.values() for p in net.parameters()]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in objective.parameters()}


@everyone
def test_bfloat16_autocast_is_close(name):
    objective = make(name)
    images = images_for(objective)
    for phase in objective.phases(0):
        exact = objective.loss(phase, images, 0.0, Draw(seed=(0,))).total
        with torch.autocast("cpu", torch.bfloat16):
            rough = objective.loss(phase, images, 0.0, Draw(seed=(0,))).total
        torch.autograd.grad(rough, list(objective.nets[phase].parameters()), allow_unused=True)
        assert rough.dtype == torch.float32 and abs(rough - exact) < 0.05 * abs(exact)


@everyone
def test_a_view_shows_what_is_visible_as_it_is(name):
    objective = make(name, "wide")
    seen = view(objective, images_for(objective), 0.0, Draw(seed=(0,)))
    assert seen.patches.isfinite().all() and seen.hidden.sum(1).tolist() == [6.0] * 4


@pytest.mark.parametrize("relaxation", sorted(relaxations))
@pytest.mark.parametrize("curriculum", sorted(set(curricula) - {"released"}))
def test_cl_mae_takes_every_option(relaxation, curriculum):
    objective = make("cl_mae", relaxation=relaxation, curriculum={"name": curriculum})
    assert objective.loss("masker", images_for(objective), 0.3, Draw(seed=(0,))).total.isfinite()


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 15), seed=st.integers(0, 999))
def test_attend_with_binary_scores_is_the_hard_pass(k, seed):
    mae = build_mae(16, 4, **SMALL).double()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    order = torch.rand(2, 16, generator=generator).argsort(1)
    logits = torch.full((2, 16), -300.0, dtype=torch.float64).scatter(1, order[:, :k], 300.0)
    tokens = mae.encoder.embed(images)
    keep = order[:, :k]
    hard = mae.decoder(mae.encoder.encode(tokens, keep), keep)
    torch.testing.assert_close(attend(mae, tokens, logits), hard, rtol=1e-9, atol=1e-9)


scores = st.integers(0, 2**31).map(
    lambda seed: torch.rand(4, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
)


@settings(max_examples=30, deadline=None)
@given(score=scores, ratio=st.floats(0.1, 0.9))
def test_losses_of_scores_are_bounded_and_smooth(score, ratio):
    score = score.requires_grad_()
    assert 0 <= undecided(score) <= 1
    assert ratio_kl_mean(score, ratio) >= -1e-12
    for sameness in samenesses.values():
        assert 0 <= sameness(score) <= 1
        shuffled = sameness(score[torch.randperm(4)])
        torch.testing.assert_close(shuffled, sameness(score))  # pairs have no order
    total = undecided(score) + ratio_kl_mean(score, ratio) + samenesses["scaled"](score)
    assert torch.autograd.grad(total, score)[0].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(score=scores, scale=st.floats(0.1, 10))
def test_soft_reconstruction_is_a_weighted_mean(score, scale):
    error = torch.rand(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for soft in soft_reconstructions.values():
        assert error.min() <= soft(error, score) <= error.max()
        torch.testing.assert_close(soft(scale * error, score), scale * soft(error, score))
        torch.testing.assert_close(soft(torch.ones_like(error), score), torch.ones((), dtype=torch.float64))
    binary = (score > 0.5).double()
    if 0 < binary.sum() < binary.numel():
        torch.testing.assert_close(
            soft_reconstructions["released"](error, binary), hidden_mean(error, 1 - binary)
        )


@settings(max_examples=50, deadline=None)
@given(pos=st.floats(0, 1), name=st.sampled_from(sorted(set(curricula) - {"released"})))
def test_curricula_stay_between_partner_and_adversary(pos, name):
    assert -1 <= make_curriculum(name)(pos) <= 1


@pytest.mark.parametrize("name", ["linear", "cosine", "released"])
def test_curricula_never_turn_back(name):
    factor = make_curriculum(name, **({"epochs": 7} if name == "released" else {}))
    values = [factor(i / 500) for i in range(501)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] == -1
