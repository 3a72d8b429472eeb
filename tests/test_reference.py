"""Agreement with numbers that the publicly released implementations computed, in float64.

`reference_tiny.npz` holds inputs, weights in the released naming, and what the released MAE and CL-MAE made
of them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clmae.curriculum import released
from clmae.losses import GAUSS_WEIGHT
from clmae.mae import build_mae
from clmae.masking import Draw, Hiding, Mask, keep_lowest
from clmae.objectives import CurriculumLearnedMasking, MaskedAutoencoding

REFERENCE = np.load(Path(__file__).parent / "reference_tiny.npz")
META = json.loads(str(REFERENCE["meta"]))
EXACT, KL = 1e-9, 1e-6  # the released KL is computed in float32; what contains it agrees to about 1e-6


def reference(key):
    return torch.from_numpy(np.array(REFERENCE[key]))


def distance(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖."""
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    return float((ours.detach().double() - theirs).norm() / theirs.norm())


def our_name(name):
    """The released name of a parameter in our words."""
    if name.startswith("masking_net."):
        rest = name.removeprefix("masking_net.")
        rest = rest.replace("cls_token", "cls").replace("mlp_head.0", "norm").replace("mlp_head.1", "head")
        return "masker." + rest.replace("blocks.", "trunk.blocks.")
    if name == "mask_token":
        return "mae.decoder.mask_token"
    for theirs, ours in [
        ("decoder_embed.", "embed."),
        ("decoder_blocks.", "trunk.blocks."),
        ("decoder_norm.", "trunk.norm."),
        ("decoder_pred.", "head."),
    ]:
        if name.startswith(theirs):
            return "mae.decoder." + name.replace(theirs, ours)
    name = name.replace("cls_token", "cls").replace("blocks.", "trunk.blocks.")
    return "mae.encoder." + ("trunk." + name if name.startswith("norm.") else name)


def released_weights(prefix, masker=True):
    """Weights under `prefix` of the reference file by our names; positions are computed, not loaded."""
    names = [key.removeprefix(prefix) for key in REFERENCE.files if key.startswith(prefix)]
    names = [n for n in names if "pos_embed" not in n and (masker or not n.startswith("masking_net."))]
    return {our_name(n): reference(prefix + n).double() for n in names}


def with_their_positions(mae):
    """Their position vectors were rounded to float32 on another path: use them where 1e-9 is asked."""
    for part, name in [(mae.encoder, "pos_embed"), (mae.decoder, "decoder_pos_embed")]:
        theirs = reference("clmae.weights." + name)[0, 1:]
        assert (part.positions - theirs).abs().max() < 1e-7
        part.positions = theirs.to(part.positions.dtype)
    return mae


def tiny_mae():
    sizes = {
        "width": META["embed_dim"],
        "depth": META["depth"],
        "heads": META["num_heads"],
        "decoder_width": META["decoder_embed_dim"],
        "decoder_depth": META["decoder_depth"],
        "decoder_heads": META["decoder_num_heads"],
    }
    return with_their_positions(build_mae(META["img_size"], META["patch_size"], 3, "micro", **sizes))


def released_cl_mae(norm_pix):
    """CL-MAE with every `released` option."""
    objective = CurriculumLearnedMasking(
        tiny_mae(),
        norm_pix=norm_pix,
        relaxation="scale",
        reconstruction="released",
        kl="released",
        diversity="released",
        weights={"gauss": GAUSS_WEIGHT, "kl": 0.1, "diversity": 2.0},
        masker={"depth": META["masker"]["depth"], "heads": META["masker"]["num_heads"]},
    ).double()
    objective.load_state_dict(released_weights("clmae.weights."))
    return objective


def given_noise(objective):
    """Hide by the reference's noise instead of our own draw."""

    class Given(Hiding):
        def propose(self, tokens, pos, draw) -> Mask:
            return keep_lowest(reference("noise"), objective.encoder.n // 4)

    objective.hiding = Given()
    return objective


images = reference("images")
DRAW = Draw(seed=(0,))
norms = pytest.mark.parametrize("norm_pix", [0, 1])


@norms
def test_mae_agrees(norm_pix):
    objective = MaskedAutoencoding(tiny_mae(), norm_pix=bool(norm_pix)).double()
    objective.load_state_dict(released_weights("clmae.weights.", masker=False))
    given_noise(objective)
    key = f"mae.norm_pix_{norm_pix}."
    pred = objective.mae(images, lambda tokens: objective.hiding.propose(tokens, 0.0, DRAW))
    latent = objective.encoder.encode(objective.encoder.embed(images), pred.mask.keep)
    assert torch.equal(pred.mask.hidden, reference(key + "hidden"))
    assert distance(latent, reference(key + "latent")) < EXACT
    assert distance(pred.patches, reference(key + "pred")) < EXACT
    assert distance(objective.loss("mae", images, 0.0, DRAW).total, reference(key + "loss")) < EXACT


@norms
def test_cl_mae_phase_a_agrees(norm_pix):
    objective, key = released_cl_mae(bool(norm_pix)), f"clmae.norm_pix_{norm_pix}."
    tokens = objective.encoder.embed(images)
    assert distance(objective.masker(tokens).sigmoid(), reference(key + "masker_prob")) < EXACT
    pred = objective.mae(images, lambda t: objective.hiding.propose(t, 0.0, DRAW))
    assert torch.equal(pred.mask.hidden, reference(key + "hidden"))
    assert distance(pred.patches, reference(key + "pred")) < EXACT
    loss = objective.loss("mae", images, 0.0, DRAW)
    assert distance(loss.total, reference(key + "mae_loss")) < EXACT
    loss.total.backward()
    assert compared_gradients(objective, key + "grad.mae_phase.") == (4, True)


def compared_gradients(objective, prefix, masker=False, tolerance=EXACT):
    """How many gradients the reference lists under `prefix`, and whether ours agree with all of them."""
    named = dict(objective.named_parameters())
    keys = [key for key in REFERENCE.files if key.startswith(prefix)]
    names = [our_name(("masking_net." if masker else "") + key.removeprefix(prefix)) for key in keys]
    close = [distance(named[name].grad, reference(key)) < tolerance for name, key in zip(names, keys)]
    return len(keys), all(close)


@norms
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_cl_mae_phase_b_agrees(norm_pix, factor):
    objective = released_cl_mae(bool(norm_pix))
    objective.factor = lambda pos: factor
    key = f"clmae.norm_pix_{norm_pix}.masker_phase."
    loss = objective.loss("masker", images, 0.0, DRAW)
    weights = {"reconstruction": 1.0, **objective.estimator.shape.weights}
    for name, term in zip(weights, reference(key + "terms")):
        assert distance(weights[name] * loss.parts[name], term) < (KL if name == "kl" else EXACT), name
    assert distance(loss.total, reference(key + f"lambda_{factor}.total")) < KL
    loss.total.backward()
    grads = key + f"lambda_{factor}.grad."
    assert compared_gradients(objective, grads, masker=True, tolerance=KL) == (5, True)
    assert all(p.grad is None for p in objective.mae.parameters())


def test_cl_mae_trajectory_agrees():
    """Two iterations of phase A then B with plain SGD: order of updates, both losses, all weights after."""
    objective = released_cl_mae(norm_pix=True)
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=0.05) for name, net in objective.nets.items()}
    weights = {"reconstruction": 1.0, **objective.estimator.shape.weights}
    for iteration, (row, factor) in enumerate(zip(reference("clmae.trajectory.losses"), [0.3, -0.3])):
        objective.factor = lambda pos, factor=factor: factor
        seen = {}
        for phase in objective.phases(0):
            loss = objective.loss(phase, images, 0.0, DRAW)
            loss.total.backward(inputs=list(objective.nets[phase].parameters()))
            optimizers[phase].step()
            optimizers[phase].zero_grad()
            if phase == "masker":
                seen |= {name: weights[name] * loss.parts[name] for name in weights}
            seen[phase] = loss.total.detach()
        for (name, ours), theirs in zip(seen.items(), row, strict=True):
            exact = name == "mae" or (iteration == 0 and name not in ("kl", "masker"))
            assert distance(ours, theirs) < (EXACT if exact else KL), (iteration, name)
    named = dict(objective.named_parameters())
    expected = released_weights("clmae.trajectory.weights.")
    assert expected
    for name, value in expected.items():
        assert distance(named[name], value) < (KL if name.startswith("masker") else EXACT), name


@pytest.mark.parametrize("epochs", [7, 8, 200])
def test_released_curriculum_agrees(epochs):
    factor = released(epochs=epochs)
    middle = [factor((e + 0.5) / epochs) for e in range(epochs)]
    assert np.allclose(middle, REFERENCE[f"curriculum.released_code.E{epochs}"], rtol=0, atol=1e-12)


def released_rc_mae():
    """RC-MAE as released: student and teacher see the same patches, weight 1, norm_pix on."""
    objective = MaskedAutoencoding(tiny_mae(), teacher={"mask": "same", "weight": 1.0}).double()
    student = released_weights("clmae.weights.", masker=False)
    teacher = {f"teacher.{k}": v for k, v in released_weights("rcmae.teacher_weights.", masker=False).items()}
    objective.load_state_dict(student | teacher)
    return given_noise(objective)


def test_rc_mae_agrees():
    objective = released_rc_mae()
    loss = objective.loss("mae", images, 0.0, DRAW)
    mask = objective.choose(objective.mae.encoder.embed(images), 0.0, DRAW)
    assert torch.equal(mask.hidden, reference("rcmae.hidden"))
    teacher = objective.teacher.predict(images, lambda _: mask).patches
    assert distance(teacher, reference("rcmae.teacher_pred")) < EXACT
    assert distance(loss.parts["reconstruction"], reference("rcmae.recon")) < EXACT
    assert distance(loss.parts["teacher"], reference("rcmae.consistency")) < EXACT
    loss.total.backward()
    head = objective.mae.decoder.head.weight.grad
    assert distance(head, reference("rcmae.grad.decoder_pred.weight")) < EXACT
    assert all(p.grad is None for p in objective.teacher.parameters())
