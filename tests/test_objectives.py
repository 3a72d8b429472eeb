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
from clmae.objectives import (
    IGNORABLE,
    CurriculumLearnedMasking,
    Turns,
    ask_teacher,
    make_objective,
    objectives,
    view,
)
from clmae.patches import patchify
from clmae.vit import checkpoint_activations

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
    extra = {"masker": {"depth": 1, "heads": 2} | settings_.pop("masker", {})} if "cl_" in name else {}
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
    learning = {id(p) for p in objective.parameters() if p.requires_grad}  # a teacher's don't
    assert len(ids) == len(set(ids)) and set(ids) == learning


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
    assert seen.patches.isfinite().all() and seen.hidden.shape == seen.patches.shape[:2] == (4, 8)
    assert set(seen.hidden.unique().tolist()) == {0.0, 1.0}
    true = patchify(images_for(objective), objective.encoder.patch_size)
    torch.testing.assert_close(seen.patches[seen.hidden == 0], true[seen.hidden == 0])


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


LEARNING = {
    "rank": {"estimator": "rank", "amplitude": 4.0, "temperature": 1.0},
    "pairs": {"estimator": {"name": "rank", "loss": "pairs"}, "temperature": {"start": 2.0, "end": 0.0}},
    "company": {"estimator": "rank", "masker": {"depth": 1, "heads": 2, "head": "token", "reach": 1}},
    "policy": {"estimator": "policy", "temperature": 1.0},
    "soft": {"estimator": "soft", "share": {"start": 0.25, "end": 1.0}},
    "narrow": {"estimator": "rank", "masker": {"width": 12, "depth": 2, "heads": 3, "head": "token"}},
}


@pytest.mark.parametrize("how", LEARNING)
@pytest.mark.parametrize("name", ["cl_mae", "cl_rc_mae", "cl_emae", "cl_rc_emae"])
@pytest.mark.parametrize("b", [1, 3])
def test_every_way_to_learn_a_mask_in_every_mixture(how, name, b):
    settings_ = {"masker": {"depth": 1, "heads": 2}, **LEARNING[how]}
    if "emae" in name and settings_["masker"].get("reach"):
        settings_["grouping"] = "deal"
    torch.manual_seed(0)
    shape = ((24, 40), (6, 8), 3) if how == "company" else SHAPES["wide"]  # a reach needs room
    objective = make_objective(build_mae(*shape, **SMALL), name, **settings_)
    images = images_for(objective, b)
    for pos in (0.0, 0.5, 1.0):
        for phase in objective.phases(0):
            loss = objective.loss(phase, images, pos, Draw(seed=(0,)))
            weights = list(objective.nets[phase].parameters())
            grads = torch.autograd.grad(loss.total, weights, allow_unused=True)
            assert all(g.isfinite().all() for g in grads if g is not None)
        objective.after_step(pos)
    mask = objective.choose(objective.mae.encoder.embed(images), 1.0, Draw(seed=(0,)))
    visible = (1 - mask.hidden).unflatten(0, (objective.parts, b)).sum(0)
    n = objective.encoder.n
    assert visible.max() == 1 and visible.sum() == b * (n if objective.parts > 1 else n // 4)


@pytest.mark.parametrize("name", ["cl_mae", "cl_rc_mae", "cl_emae", "cl_rc_emae"])
@pytest.mark.parametrize("how", ["rank", "company", "policy"])
def test_masks_of_micro_batches_are_those_of_the_batch(name, how):
    settings_ = {"masker": {"depth": 1, "heads": 2}, **LEARNING[how], "share": 0.5}
    if "emae" in name and settings_["masker"].get("reach"):
        settings_["grouping"] = "deal"
    torch.manual_seed(0)
    objective = make_objective(build_mae(*SHAPES["square"], **SMALL), name, **settings_)
    tokens = objective.mae.encoder.embed(images_for(objective, 6))
    whole = objective.choose(tokens, 0.2, Draw(seed=(3,))).hidden.unflatten(0, (objective.parts, 6))
    for start in (0, 2, 4):
        draw = Draw(seed=(3,), start=start, total=6)
        piece = objective.choose(tokens[start : start + 2], 0.2, draw).hidden
        assert torch.equal(piece.unflatten(0, (objective.parts, 2)), whole[:, start : start + 2])


@pytest.mark.parametrize("excess", [False, True])
def test_excess_is_the_error_beyond_the_teachers(excess):
    objective = make("cl_rc_mae", estimator="rank", excess=excess)
    images = images_for(objective)
    objective.loss("mae", images, 0.0, Draw(seed=(0,)))
    (seen,) = objective.lessons.seen.values()
    # the teacher is still the student: nothing exceeds its error
    assert (seen.error.abs().max() < 1e-6) == excess


def test_excess_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher"):
        make("cl_mae", excess=True)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"estimator": "frozen", "masker": {"every": 2}}, "takes no turns"),
        ({"estimator": "frozen", "masker": {"fraction": 0.5}}, "takes no turns"),
        ({"grouping": "deal"}, "one part, nothing to deal"),
    ],
)
def test_a_setting_without_effect_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make("cl_mae", **settings)


def test_what_may_be_left_alone_is_the_default():
    defaults = CurriculumLearnedMasking.__init__.__kwdefaults__
    for name in IGNORABLE.keys() & defaults.keys():
        assert defaults[name] == IGNORABLE[name]
    for estimator in ("rank", "frozen", "policy", "soft"):
        extra = {"temperature": 1.0, "weights": {"kl": 25.6}, "kl": "mean", "excess": False}
        make("cl_mae", estimator=estimator, **extra)  # nothing is said that isn't so anyway


@pytest.mark.parametrize("estimator", ["rank", "policy", "frozen", "soft"])
def test_nothing_is_kept_for_a_turn_that_does_not_come(estimator):
    torch.manual_seed(0)
    turns = {"every": 2} if estimator != "frozen" else {}
    settings = {"estimator": estimator, "temperature": 1.0, "masker": {"depth": 1, "heads": 2, **turns}}
    objective = make_objective(build_mae(*SHAPES["square"], **SMALL), "cl_mae", **settings)
    for step, kept in (
        (0, estimator in ("rank", "policy")),
        (1, False),
        (2, estimator in ("rank", "policy")),
    ):
        objective.before_step(step)
        objective.loss("mae", images_for(objective), 0.0, Draw(seed=(step,)))
        assert bool(getattr(objective.lessons, "seen", {})) == kept
        objective.after_step(0.0)


@everyone
def test_the_teacher_moves_after_a_step_and_by_the_momentum_of_its_place(name):
    objective = make(name)
    if not objective.teacher:
        assert objective.encoder is objective.mae.encoder
        return
    assert objective.encoder is objective.teacher.encoder
    before = objective.encoder.patch_embed.proj.weight.clone()
    objective.loss("mae", images_for(objective), 0.5, Draw(seed=(0,))).total.backward()
    with torch.no_grad():
        objective.mae.encoder.patch_embed.proj.weight += 1
    assert torch.equal(objective.encoder.patch_embed.proj.weight, before)  # a loss moves nothing
    objective.after_step(0.5)
    moved = objective.encoder.patch_embed.proj.weight - before
    expected = torch.full_like(moved, 1 - objective.momentum(0.5))
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_a_combination_needs_a_block_and_no_code():
    settings_ = {"mask": {"name": "hard", "end": 0.75}, "parts": {"consistency": "l2"}}
    settings_["teacher"] = {"mask": "different"}
    torch.manual_seed(0)
    objective = make_objective(build_mae(*SHAPES["square"], **SMALL), "mae", **settings_)
    images = images_for(objective)
    for step in range(4):
        loss = objective.loss("mae", images, step / 3, Draw(seed=(0, step)))
        objective.after_step(step / 3)
    assert loss.parts.keys() == {"reconstruction", "consistency", "teacher"} and loss.parts["consistency"] > 0
    assert objective.state_dict()["hiding.difficulty"].abs().sum() > 0  # what hiding remembers is kept


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_fraction_means_the_same_images_however_a_batch_is_cut(accumulate):
    objective = make("cl_mae", estimator="rank", temperature=1.0)
    objective.turns = Turns(fraction=0.25)
    objective.double()
    images = images_for(objective, 8).double()
    whole = objective.loss("masker", images, 0.2, Draw(seed=(1,), total=8)).total
    size = 8 // accumulate
    cuts = [
        objective.loss("masker", images[s : s + size], 0.2, Draw(seed=(1,), start=s, total=8)).total
        for s in range(0, 8, size)
    ]
    torch.testing.assert_close(sum(cuts) / accumulate, whole)


@pytest.mark.parametrize("weight, fine", [(1.0, False), (0.0, True)])
def test_two_parts_can_only_be_trained_without_comparing_them(weight, fine):
    def build():
        return make("emae", mask_ratio=0.5, parts={"weight": weight})

    if not fine:
        with pytest.raises(ValueError, match="two never hide"):
            build()
        return
    objective = build()
    assert objective.loss("mae", images_for(objective), 0.0, Draw(seed=(0,))).total.isfinite()


def test_a_teacher_with_another_mask_is_compared_where_neither_sees():
    objective = make("rc_mae", teacher={"mask": "different"})
    images, draw = images_for(objective), Draw(seed=(0,))
    mask = objective.choose(objective.mae.encoder.embed(images), 0.0, draw)
    taught = ask_teacher(objective, images, mask, 0.0, draw)
    assert not torch.equal(taught.mask.hidden, mask.hidden)
    both = mask.hidden * taught.mask.hidden
    said = objective.mae(images, lambda tokens: mask).patches
    expected = hidden_mean((said - taught.patches).square().mean(-1), both)
    torch.testing.assert_close(objective.loss("mae", images, 0.0, draw).parts["teacher"], expected.detach())


def test_frozen_is_rank_that_never_learns():
    objective = make("cl_mae", estimator="frozen", temperature=1.0, amplitude=5.0)
    assert objective.phases(0) == ("mae",)
    tokens = objective.mae.encoder.embed(images_for(objective))
    wish = objective.hiding.wish(tokens, 0.0)
    torch.testing.assert_close(wish, -objective.hiding.wish(tokens, 1.0))  # it turns over with λ
    torch.testing.assert_close(wish.std(1, correction=0), torch.full((4,), 5.0))


@pytest.mark.parametrize("name", sorted(objectives))
def test_activations_computed_again_are_the_same(name):
    def learn(on):
        """Loss and gradients of every phase, and the bytes that were kept for backward."""
        torch.manual_seed(0)
        sizes = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
        mae = build_mae(16, 4, width=32, depth=4, heads=2, **sizes)
        objective = make_objective(mae, name, **({"masker": {"depth": 1}} if "cl_" in name else {}))
        images = torch.randn(4, 3, 16, 16)
        checkpoint_activations(objective.mae, on)
        found, kept = [], {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        for phase in objective.phases(0):
            weights = list(objective.nets[phase].parameters())
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                total = objective.loss(phase, images, 0.3, Draw(seed=(0,))).total
            total.backward(inputs=weights)
            found += [total.detach(), *(w.grad for w in weights)]
        return found, sum(storage.nbytes() for storage in kept.values())

    (plain, most), (again, least) = learn(False), learn(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert least < 0.6 * most
