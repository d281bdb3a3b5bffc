"""The options of a run beside trainer, model and data, and what `--help` says of them all."""

from pytorch_lightning.cli import LightningArgumentParser

from sinkformer_pl.training.run_folder import DEFAULT_NAME

DESCRIPTIONS = {
    "fit": "Train a classifier whose attention is normalized as the configuration says.",
    "validate": "Evaluate a checkpoint on the validation samples of its data, or of others.",
    "test": "Evaluate a checkpoint on the test samples of its data, or of others.",
    "predict": "Write predictions.csv: the class of each test sample, and the probabilities of all.",
}


def described(command: str) -> dict[str, str]:
    """How the help of a command begins: the arguments `usage` and `description` of its parser."""
    needed = "--config FILE" if command == "fit" else "--ckpt_path PATH"
    usage = f"python -m sinkformer_pl {command} {needed} [--OPTION VALUE ...]"
    return {"usage": usage, "description": DESCRIPTIONS[command]}


def add_run_options(parser: LightningArgumentParser) -> None:
    """Add them to the parser of a command."""
    parser.add_argument("--name", type=str, default=DEFAULT_NAME, help="Name of the run, and of its folder.")
    parser.add_argument(
        "--plugins",
        type=str | list[str],
        default=[],
        help="Modules with your own classes, imported first: --plugins a,b",
    )
    parser.add_argument(
        "--monitor",
        type=str,
        default="val/accuracy",
        help="What best.ckpt is best in: the highest, or the lowest if the name has 'loss' in it.",
    )
    parser.add_argument(
        "--require_finite",
        type=bool,
        default=True,
        help="Stop at the step whose loss or gradients aren't finite, before they change the weights.",
    )
    parser.add_argument(
        "--checkpoint_every",
        type=int | str | None,
        default=None,
        help="Write last.ckpt within epochs, too: every so many optimizer steps (500), or so often (90s, 10min).",
    )


def explain(parser: LightningArgumentParser, command: str) -> None:
    """Say of Lightning's options what they are here."""
    for action in parser._actions:
        if action.dest == "ckpt_path":
            action.help = "A checkpoint: its path, or 'last' or 'best' for that of the newest run of this --name."
        if command != "fit" and action.dest in ("model.backbone", "model.normalization"):
            # The checkpoint has it.
            action.required = False
    parser._action_groups[-1].title = "The checkpoint"
