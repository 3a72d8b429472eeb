"""The command line, `python -m clmae`. Thin: a command reads the parameters and calls the function that does the work.

All commands need the package alone, but `stage` and `verify`, which also need the extra `repro` (papermill and DVC).
"""

import argparse
import os
import signal
import sys
from itertools import product

from clmae.config import Stopped, UserError

EXAMPLES = """examples:
  python -m clmae validate                    check params.yaml, run nothing
  python -m clmae prepare                     images in data/ -> build/prepared
  python -m clmae shard /data/photos /data/shards
                                              images as tar files, for `shards.urls`
  python -m clmae doctor --run mae            is all there, does it fit, how long will it take?
  python -m clmae pretrain --run mae --seed 0 one run; without options: every run with every seed
  torchrun --nproc-per-node 8 -m -- clmae pretrain --run mae --seed 0
                                              the same on eight devices, batch and result the same
  python -m clmae plan --preset huge --gpus 64 --images 1.28M --epochs 800
                                              memory, steps, hours, learning rate: a prediction
  python -m clmae replay build/work/mae-0-1f00/incident
                                              which operation made the loss no number?
  python -m clmae bakeoff --list              which runs of the comparison are done, what the others cost
  python -m clmae evaluate && python -m clmae baselines && python -m clmae figures
  dvc repro                                   all of it, only what changed, into results/
"""


PLANNED = [
    ("preset", "base", "size of the model: tiny, small, base, large, huge; default: %(default)s"),
    ("image-size", "224", "pixels of a side; default: %(default)s"),
    ("patch-size", "", "pixels of a side; default: 14 for huge, else 16"),
    ("images", "1281167", "of the training set, as 50000, 50k or 1.28M; default: ImageNet's %(default)s"),
    ("epochs", "800", "default: %(default)s"),
    ("batch", "4096", "images of a step, on all devices together; default: %(default)s"),
    ("gpus", "8", "number of devices; default: %(default)s"),
    ("device", "h100", "a100, h100, h200, rtx4090, tpu-v3-core; default: %(default)s"),
    ("efficiency", 0.4, "share of the peak that training reaches, an assumption; default: %(default)s"),
    ("base-lr", 1.5e-4, "learning rate for 256 images a step; default: %(default)s"),
]


def valid(args):
    """The validated parameters."""
    from clmae.pipeline import read_valid

    return read_valid(args.params)


def pairs(args, config):
    """The (run, seed) pairs that a command is about."""
    from clmae.config import unknown

    if args.run is not None and args.run not in config.objectives:
        raise unknown("run", args.run, config.objectives, key="--run")
    runs = config.runs if args.run is None else [args.run]
    seeds = config.seeds if args.seed is None else [args.seed]
    return product(runs, seeds)


def validate(args):
    config = valid(args)
    print(f"{args.params}: fine; runs {', '.join(config.runs)}; seeds {', '.join(map(str, config.seeds))}")


def prepare(args):
    from clmae import data, runs

    config, root, say = valid(args), runs.home(), runs.speaker()
    settings = config.data.model_dump(exclude={"root"})
    show = lambda done, total: done % 100 or say(f"{done} of {total} images")  # noqa: E731
    manifest = data.prepare(root / config.data.root, root / args.prepared, **settings, progress=show)
    counts = ", ".join(f"{split['images']} {name}" for name, split in manifest["splits"].items())
    print(f"\r{args.prepared}: {counts} images, {len(manifest['skipped'])} files skipped")


def shard(args):
    from clmae import runs, shards

    data, say = valid(args).data, runs.speaker()
    show = lambda done, total: done % 100 or say(f"{done} of {total} images")  # noqa: E731
    how = {"image_size": data.image_size, "channels": data.channels}
    if ".tar" in args.source:
        found = shards.expand(args.source)
        manifest = shards.survey(found, args.out, **how, progress=lambda n, of: say(f"{n} of {of} shards"))
    else:
        how |= data.model_dump(include={"validation", "max_bad", "min_size", "seed"})
        how |= {"per_shard": args.per_shard, "quality": args.quality}
        manifest = shards.shard(args.source, args.out, **how, progress=show)
    splits = {name: split["images"] for name, split in manifest["splits"].items() if split["images"]}
    counts = ", ".join(f"{images} {name}" for name, images in splits.items())
    print(
        f"\r{args.out}: {len(manifest['shards'])} shards, {counts} images, {len(manifest['skipped'])} skipped"
    )


def pretrain(args):
    from clmae import runs

    config = valid(args)
    sections = {
        name: getattr(config, name) for name in ("data", "model", "train", "shards", "film", "evaluate")
    }
    for run, seed in pairs(args, config):
        runs.pretrain_run(run=run, seed=seed, objective=config.objectives[run], **sections)


def scores(result):
    """Test accuracies as one piece of a line, or why there are none."""
    probes = {
        name: value for name, value in result.items() if isinstance(value, dict) and "accuracy" in value
    }
    found = {name: probe["accuracy"] for name, probe in probes.items()}
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in found.items()) or result["skipped"]


def evaluate(args):
    from clmae import runs

    config = valid(args)
    for run, seed in pairs(args, config):
        result = runs.evaluate_run(run=run, seed=seed, evaluate=config.evaluate, train=config.train)
        print(f"{run}-{seed}: {scores(result)}")


def baselines(args):
    from clmae import runs

    config = valid(args)
    sections = {name: getattr(config, name) for name in ("data", "model", "train", "evaluate")}
    for name, result in runs.baselines_run(**sections).items():
        print(f"{name}: {scores(result)}")


def figures(args):
    from clmae.config import read_params
    from clmae.figures import draw_all

    config = read_params(args.params)
    print(f"results/figures: {', '.join(draw_all(config.runs, config.seeds))}")


def plan(args):
    from clmae import cost
    from clmae.config import unknown

    config = None if args.run is None else valid(args)
    blocks = config.objectives if config else {}
    if args.run is not None and args.run not in blocks:
        raise unknown("run", args.run, blocks, key="--run")
    sizes = {key: getattr(args, key) for key in ("preset", "images", "epochs", "batch", "gpus", "device")}
    sizes |= {"image_size": cost.read_count(args.image_size, "--image-size")}
    sizes |= {"patch_size": args.patch_size and cost.read_count(args.patch_size, "--patch-size")}
    rates = {"efficiency": args.efficiency, "precision": args.precision, "base_lr": args.base_lr}
    given = {"peak_flops": args.peak and args.peak * 1e12, "room": args.memory and args.memory * 1e9}
    again = args.checkpoint_activations or (config is not None and config.train.checkpoint_activations)
    print(cost.describe(cost.plan(**sizes, **rates, **given, objective=blocks.get(args.run), again=again)))


def replay(args):
    from clmae import doctor

    again, report = doctor.retake(args.folder, args.device)
    print(report)
    return 0 if again else 1


def doctor(args):
    from clmae import doctor as checks

    states = []
    for line in checks.examine(args.params, args.run, args.steps):
        states.append(line.state)
        print(line, flush=True)
    wrong, notes = states.count("wrong"), states.count("note")
    print(f"{wrong} of {len(states)} wrong, {notes} to note")
    return 1 if wrong else 0


def bakeoff(args):
    from clmae import bakeoff as trial

    where = {"label": args.set, "params": args.params, "prepared": args.prepared}
    if args.read:
        from clmae.readout import read_out

        print(*read_out(args.set), sep="\n")
        return 0
    if args.list:
        print(*trial.listing(trial.records_of(trial.home(), args.set), args.set), sep="\n")
        return 0
    if args.arm is None and not args.baselines:
        done = trial.run_missing(minutes=args.minutes, report=lambda line: print(line, flush=True), **where)
        print("all runs are done" if done else "the same command goes on")
        return 0
    if args.baselines:
        name, (record, differing) = trial.BASELINES, trial.run_baselines(**where)
        told = "; ".join(f"{key}: {scores(result)}" for key, result in record["metrics"].items())
    else:
        job = trial.job_of(args.budget, args.arm, args.seed, args.factor)
        name, (record, differing) = job.name, trial.run_one(job, **where)
        told = trial.said(record)
    outcome = told if differing is None else f"other {', '.join(differing)}"
    if not args.quiet:
        print(f"{name}: {'as recorded' if differing == [] else outcome}")
    return 1 if differing else 0


def steps(text):
    """A number of steps from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def complain(error, code):
    """Say what went wrong; returns the exit code."""
    if getattr(error, "story", ""):
        print(error.story, file=sys.stderr)
    print(f"clmae: error: {error}", file=sys.stderr)
    return code


def stage(args):
    from clmae import pipeline

    try:
        pipeline.run_stage(args.name, args.keys, run=args.run, seed=args.seed, params=args.params)
    except pipeline.StageError as error:
        return complain(error, 1)


def readme(args):
    from clmae.files import find_root
    from clmae.pipeline import write_readme

    write_readme(find_root(), check=args.check)


def verify(args):
    from clmae import pipeline
    from clmae.files import find_root

    try:
        return 0 if pipeline.verify(find_root(), args.tolerance) else 1
    except pipeline.StageError as error:
        return complain(error, 1)


def parser():
    top = argparse.ArgumentParser(
        "clmae", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(metavar="command", required=True)

    def add(call, text, params=True, pair=False):
        command = commands.add_parser(call.__name__, help=text, description=text)
        command.set_defaults(call=call)
        if params:
            command.add_argument(
                "--params", default="params.yaml", metavar="FILE", help="default: %(default)s"
            )
        if pair:
            command.add_argument("--run", metavar="NAME", help="a block under objectives; default: all runs")
            command.add_argument("--seed", type=int, metavar="N", help="default: all seeds")
        return command

    add(validate, "check the parameters, run nothing")
    command = add(prepare, "decode, resize and store the images of data.root")
    command.add_argument(
        "--prepared", default="build/prepared", metavar="FOLDER", help="where to; default: %(default)s"
    )
    command = add(shard, "write images as tar files, for sets too large to prepare; or count such files")
    command.add_argument("source", metavar="SOURCE", help="a folder as data.root is, or tar files to count")
    command.add_argument("out", metavar="OUT", help="the folder for shards and manifest.json; replaced whole")
    command.add_argument(
        "--per-shard", type=steps, default=1000, metavar="N", help="images of a shard; default: %(default)s"
    )
    command.add_argument(
        "--quality", type=steps, metavar="Q",
        help="write what is neither JPEG, PNG nor WebP as JPEG of quality Q; default: as PNG",
    )  # fmt: skip
    add(pretrain, "pretrain; an interrupted run continues from its checkpoint", pair=True)
    add(evaluate, "kNN and linear probe on the frozen features of pretrained encoders", pair=True)
    add(baselines, "the same probes on a random encoder, pixels and PCA")
    add(figures, "draw every figure from results/ and write results/metrics.json")
    command = add(plan, "what pretraining would take: memory, steps, hours, learning rate; a prediction")
    command.add_argument("--run", metavar="NAME", help="a block under objectives; default: plain MAE")
    for key, default, text in PLANNED:
        command.add_argument(f"--{key}", default=default, type=type(default), metavar="N", help=text)
    command.add_argument("--peak", type=float, metavar="T", help="TFLOP/s of a device, not the data sheet's")
    command.add_argument("--memory", type=float, metavar="GB", help="of a device, not the data sheet's")
    command.add_argument("--precision", choices=["32", "bf16"], default="bf16", help="default: %(default)s")
    command.add_argument(
        "--checkpoint-activations", action="store_true",
        help="compute blocks again in backward; default: as params.yaml says for --run, else not",
    )  # fmt: skip
    command = add(
        replay, "take the step again that made a loss no number, and name the operation", params=False
    )
    command.add_argument("folder", metavar="FOLDER", help="the incident, as the run's last line named it")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    command = add(doctor, "check machine, parameters and images; measure a few steps; 1 if anything is wrong")
    command.add_argument("--run", metavar="NAME", help="whose steps to measure; default: the first of runs")
    command.add_argument(
        "--steps", type=steps, default=20, metavar="N", help="how many; default: %(default)s"
    )
    command = add(bakeoff, "compare the methods: run what is missing of the protocol in nbs/20_bakeoff")
    command.add_argument("--set", default="embedded", metavar="NAME", help="of the records; default: %(default)s")
    command.add_argument(
        "--prepared", default="build/prepared", metavar="FOLDER", help="prepared images; default: %(default)s"
    )
    command.add_argument("--list", action="store_true", help="show what is done and what is missing, run nothing")
    command.add_argument("--read", action="store_true", help="write figures and conclusions of what is recorded")
    command.add_argument(
        "--minutes", type=float, default=60.0, metavar="M", help="stop and save after so many; default: %(default)s"
    )
    command.add_argument("--arm", metavar="NAME", help="run only this arm; if it is recorded, compare")
    command.add_argument("--seed", type=int, default=10, metavar="N", help="of that arm; default: %(default)s")
    command.add_argument("--budget", choices=["flops", "images"], default="flops", help="default: %(default)s")
    command.add_argument("--factor", type=float, metavar="F", help="a tuning trial with base_lr times F")
    command.add_argument(
        "--baselines", action="store_true", help="score what needs no training; if it is recorded, compare"
    )
    command.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    command = add(stage, "run one stage's notebook, as dvc.yaml does", pair=True)
    command.add_argument("name", help="prepare, pretrain, evaluate, ...: nbs/stages/*_NAME.ipynb")
    command.add_argument(
        "-P", dest="keys", action="append", default=[], metavar="KEY",
        help="hand this section of the parameters, or key of a section, to the notebook (repeatable)",
    )  # fmt: skip
    command = add(readme, "write README.md from nbs/index.ipynb", params=False)
    command.add_argument("--check", action="store_true", help="write nothing; exit 2 if it differs")
    command = add(verify, "rebuild the last commit in build/verify and compare the results", params=False)
    command.add_argument(
        "--tolerance", type=float, default=0.02, metavar="T",
        help="numbers agree if they differ by less than T, relative to the larger where that exceeds 1; default: %(default)s",
    )  # fmt: skip
    return top


def first_process():
    """Whether this process speaks for all that torchrun or srun has started."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def main(argv=None) -> int:
    """Run a command; 0 fine, 1 failed, 2 the user's mistake (one line on stderr), 130 interrupted.

    Also 1: `doctor` found something wrong, `replay` found nothing.
    Also 0: `pretrain` was asked to stop by SIGTERM or SIGUSR1 and has saved its work. A stage ends with 2 then,
    because DVC takes a stage that ends with 0 for finished.
    """
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.call is not pretrain and "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError(f"{args.call.__name__} runs in one process; start it without torchrun")
        return args.call(args) or 0
    except Stopped as error:
        if first_process():  # all were stopped together
            print(f"\nclmae: {error}", file=sys.stderr)
        return 2 if args.call is stage else 0
    except UserError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        again = "`dvc repro`" if args.call is stage else "the same command"
        print(f"\nclmae: interrupted; {again} continues from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
