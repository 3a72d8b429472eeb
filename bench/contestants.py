"""Who competes: one training step of each, all of the same sizes, and proof that the same is computed."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clmae.config import Config
from clmae.cost import step_flops
from clmae.losses import GAUSS_WEIGHT
from clmae.mae import MAE, build_mae
from clmae.masking import Draw, Hiding
from clmae.objectives import MaskedAutoencoding, make_objective
from clmae.trainer import make_fabric, make_optimizers, one_step
from clmae.vit import compile_blocks

from . import textbook

BETAS, WEIGHT_DECAY, RATE, POS, EPOCHS = (0.9, 0.95), 0.05, 1e-4, 0.25, 200
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """What is measured: a preset of clmae/vit.py, square images and patches (px), images a step, rounds.

    With `mae_only` no CL-MAE competes.
    """

    name: str
    preset: str
    image: int
    patch: int
    batch: int
    rounds: int
    title: str
    changes: dict = field(default_factory=dict)
    mae_only: bool = False

    def mae(self) -> MAE:
        """A fresh MAE of this size, the same at every call."""
        torch.manual_seed(0)
        return build_mae(self.image, self.patch, 3, self.preset, **self.changes)

    def images(self, batch: int | None = None) -> Tensor:
        """Normalised images (b, 3, h, w) of noise: what they show has no part in the time."""
        shape = batch or self.batch, 3, self.image, self.image
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@dataclass
class Contestant:
    """One method's training step, in phases that are timed one by one; `cycle` steps make up one sample.

    A phase takes the number of the step. `precision` is 32 or bf16. `operations` are those of the matrix
    products that a step cannot do without, by the cost model; 0 where it doesn't say.
    """

    name: str
    precision: str
    parameters: int
    phases: dict[str, Callable[[int], None]]
    cycle: int = 1
    operations: float = 0.0


def trainable(net: nn.Module) -> int:
    """The number of values that learn."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def ours(
    name: str, case: Case, precision: str, device: str, settings: dict, compiled: bool = False
) -> Contestant:
    """Our trainer's step, with the settings of a block of params.yaml."""
    fabric = make_fabric(device, precision)
    objective = make_objective(case.mae(), epochs=EPOCHS, **settings)
    operations = step_flops(objective, case.batch)
    if compiled:
        compile_blocks(objective)
    objective.calls = {net: fabric.setup_module(module) for net, module in objective.nets.items()}
    optimizers = make_optimizers(objective, betas=BETAS, weight_decay=WEIGHT_DECAY)
    images = case.images().to(fabric.device)

    def step(number: int) -> None:
        draw = Draw(seed=(0, number), start=0, total=case.batch)
        one_step(fabric, objective, optimizers, number, [(images, draw)], POS, RATE, None)

    every = objective.turns.every if hasattr(objective, "turns") else 1
    return Contestant(name, precision, trainable(objective), {"step": step}, every, operations)


def autocast(device: str, precision: str):
    """The context in which others compute: mixed bfloat16, or nothing."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if precision == "bf16" else nullcontext()


def adamw(net: nn.Module, **how) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), lr=RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, **how)


def move(optimizer, loss: Callable[[], Tensor], device: str, precision: str) -> None:
    """Forward, backward, optimizer step."""
    with autocast(device, precision):
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def mae_operations(case: Case) -> float:
    """Operations of an MAE's step, whoever wrote it: the network is the same."""
    return step_flops(MaskedAutoencoding(case.mae()), case.batch)


def masked(
    name: str, case: Case, precision: str, device: str, build, compiled: bool = False, **how
) -> Contestant:
    """The step of an MAE `build(our MAE)` whose forward takes images and noise and gives the loss."""
    net = build(case.mae()).to(device)
    call = torch.compile(net) if compiled else net
    optimizer, images, n = adamw(net, **how), case.images().to(device), case.mae().encoder.n

    def step(number: int) -> None:
        noise = torch.rand(case.batch, n, device=device)
        move(optimizer, lambda: call(images, noise), device, precision)

    return Contestant(name, precision, trainable(net), {"step": step}, operations=mae_operations(case))


def textbook_mae(ours: MAE) -> textbook.MAE:
    """The textbook's MAE with our weights."""
    encoder, decoder = ours.encoder, ours.decoder
    sizes = encoder.trunk_settings["depth"], encoder.trunk_settings["heads"]
    patch, values = encoder.patch_size[0], decoder.head.out_features
    theirs = textbook.MAE(
        textbook.Encoder(patch, encoder.channels, encoder.positions.clone()[None], *sizes),
        textbook.Decoder(
            encoder.width,
            values,
            decoder.positions.clone()[None],
            decoder.settings["depth"],
            decoder.settings["heads"],
        ),
        patch,
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs


def textbook_cl_mae(ours: MAE) -> textbook.CLMAE:
    """The textbook's CL-MAE with our MAE's weights, its masker fresh."""
    return textbook.CLMAE(textbook_mae(ours), textbook.Masker(ours.encoder.n, ours.encoder.width))


def textbook_phases(case: Case, precision: str, device: str) -> list[Contestant]:
    """CL-MAE's two phases with the pair loop and without it, on one net and one optimizer."""
    net = textbook_cl_mae(case.mae()).to(device)
    optimizer, images, parameters = adamw(net), case.images().to(device), trainable(net)

    def a(number: int) -> None:
        move(optimizer, lambda: net.mae_phase(images), device, precision)

    def b(number: int) -> None:
        move(optimizer, lambda: net.masker_phase(images, 0.5), device, precision)

    def b_at_once(number: int) -> None:
        everything = textbook.diversity_matrix
        move(optimizer, lambda: net.masker_phase(images, 0.5, everything), device, precision)

    return [
        Contestant("CL-MAE, textbook", precision, parameters, {"A": a, "B": b}),
        Contestant("CL-MAE, textbook without pair loop", precision, parameters, {"A": a, "B": b_at_once}),
    ]


def libraries() -> dict[str, Callable[[MAE], nn.Module]]:
    """The other libraries' MAE by name; none where they are not installed."""
    try:
        from . import others
    except ModuleNotFoundError:
        return {}
    return {"MAE, Hugging Face": others.HuggingFace, "MAE, lightly": others.Lightly}


def blocks(params: Config) -> dict[str, dict]:
    """Our contestants: name → block of params.yaml, all with standardised targets."""
    named = {"MAE, ours": "mae", "CL-MAE, ours faithful": "cl_mae_released", "CL-MAE, ours": "cl_mae"}
    return {name: params.objectives[block] for name, block in named.items()}


def mae_contestants(case: Case, precision: str, device: str, block: dict, compiled: bool) -> list[Contestant]:
    """The MAEs, ours first; with `compiled` also ours and Hugging Face's as torch.compile makes them."""
    known, fast = libraries(), {"fused": True}
    found = [ours("MAE, ours", case, precision, device, block)]
    found += [masked(name, case, precision, device, net, **fast) for name, net in known.items()]
    found.append(masked("MAE, textbook", case, precision, device, textbook_mae))
    if compiled:
        found.append(ours("MAE, ours, compiled", case, precision, device, block, compiled=True))
    if compiled and (net := known.get("MAE, Hugging Face")):
        name = "MAE, Hugging Face, compiled"
        found.append(masked(name, case, precision, device, net, compiled=True, **fast))
    return found


def contestants(
    case: Case, precision: str, device: str, params: Config, compiled: bool = False
) -> list[Contestant]:
    """All that compete in a case at a precision."""
    named = blocks(params)
    found = mae_contestants(case, precision, device, named.pop("MAE, ours"), compiled)
    if not case.mae_only:
        found += textbook_phases(case, precision, device)
        found += [ours(name, case, precision, device, block) for name, block in named.items()]
    same_size(found)
    return found


def same_size(found: list[Contestant]) -> None:
    """ValueError unless all MAEs have as many parameters, and all CL-MAEs that compute the same."""
    for group, leader in (("MAE,", "MAE, ours"), ("CL-MAE,", "CL-MAE, ours faithful")):
        sizes = {c.name: c.parameters for c in found if c.name.startswith(group)}
        sizes.pop("CL-MAE, ours", None)  # its masker is another, smaller one
        for name, size in sizes.items():
            if size != sizes[leader]:
                raise ValueError(f"{name} has {size} parameters, {leader} has {sizes[leader]}")


def same_loss(name: str, theirs: Tensor, ours: Tensor) -> float:
    """The relative difference of two losses; ValueError if it is above the tolerance."""
    difference = abs(theirs.item() / ours.item() - 1)
    if not difference <= TOLERANCE:
        raise ValueError(f"{name}: loss {theirs.item():.8f} where ours is {ours.item():.8f}")
    return difference


@dataclass
class Given(Hiding):
    """Hides all but the patches of lowest noise (b, n)."""

    noise: Tensor
    ratio: float = 0.75

    def order(self, tokens: Tensor, pos: float, draw: Draw) -> Tensor:
        return self.noise.argsort(dim=1)


def check(case: Case, params: Config, images: int = 4) -> dict[str, float]:
    """Relative differences from our losses at the same weights, in float64.

    ValueError where they are large.
    """
    mae, batch = case.mae().double(), case.images(images).double()
    noise, draw = torch.rand(images, mae.encoder.n, dtype=torch.float64), Draw(seed=(0,), total=images)
    objective = MaskedAutoencoding(mae)
    objective.hiding = Given(noise)
    found = {}
    with torch.no_grad():
        loss = objective.loss("mae", batch, POS, draw).total
        for name, build in {**libraries(), "MAE, textbook": textbook_mae}.items():
            found[name] = same_loss(name, build(mae).double()(batch, noise), loss)
    if case.mae_only:
        return found
    return found | check_phases(mae, batch, draw, blocks(params)["CL-MAE, ours faithful"])


def check_phases(mae: MAE, images: Tensor, draw: Draw, block: dict) -> dict[str, float]:
    """The same for the textbook's two phases against our released options."""
    weights = block["weights"] | {"gauss": GAUSS_WEIGHT}  # params.yaml rounds it
    objective = make_objective(mae, epochs=EPOCHS, **{**block, "weights": weights}).double()
    theirs = textbook_cl_mae(mae).double()
    theirs.load_state_dict(objective.state_dict())
    factor, found = objective.factor(POS), {}
    with torch.no_grad():
        a, b = (objective.loss(phase, images, POS, draw).total for phase in ("mae", "masker"))
        found["CL-MAE, textbook A"] = same_loss("CL-MAE, textbook A", theirs.mae_phase(images), a)
        for how in (textbook.diversity_loop, textbook.diversity_matrix):
            name = f"CL-MAE, textbook B, {how.__name__}"
            found[name] = same_loss(name, theirs.masker_phase(images, factor, how), b)
    return found
