"""One line for a wrong argument, where the parser has fifty."""

import inspect
import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher

import pytorch_lightning as pl
from torch.optim import Optimizer

from sinkformer_pl.data import ClassificationData
from sinkformer_pl.errors import RunError, UserError
from sinkformer_pl.factories import abstract, import_class, parameters_of
from sinkformer_pl.models import Backbone
from sinkformer_pl.normalizations import registered
from sinkformer_pl.tasks import Schedule

PARTS = {
    "backbone": Backbone,
    "schedule": Schedule,
    "optimizer": Optimizer,
    "data": ClassificationData,
    "callbacks": pl.Callback,
}
"""Keys whose value is a class, and what the valid ones are subclasses of."""

NORMALIZATIONS = ("normalization", "pooling")
"""Keys whose value is a registered normalization."""

SCALARS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
KINDS = {
    **SCALARS,
    "NoneType": "null",
    **dict.fromkeys(("list", "tuple", "Sequence"), "a list, such as [1, 2]"),
}

LIKE = 0.6
"""How alike, of 1, two names must be for one to be a slip of the other."""

CLASS_PATH = r"class_path'?[=: ]+'([\w.]+)'"

REMEDIES = {
    "Early stopping conditioned on metric": "give another monitor",
    "DataLoader worker (pid": "it may have lacked memory: lower data.num_workers or data.batch_size",
    "SparseAdam does not support dense gradients": "give another optimizer",
    "CUDA out of memory": "lower data.batch_size, with trainer.accumulate_grad_batches for the same steps",
}
"""What to do about errors in the course of a run, by how the messages of Lightning and PyTorch begin."""


def condense(message: str, options: Iterable[str]) -> str:
    """Say what is wrong and what would be right, in one line; in two where names are to be listed.

    Args:
        message: what the argument parser has to say.
        options: the options of the command, without their dashes.
    """
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    # The parser nests its messages; the cause is behind the last key.
    cause = message[message.rfind("Parser key") :] if key else message
    options = list(options)
    if match := re.search(r'Parser key "(\w+)": Unable to load config "(.*)"', cause, re.DOTALL):
        return not_settings(match[1], match[2], options)
    if match := re.search(r"unrecognized arguments: (\S+)|does not accept option '([\w.]+)'", cause):
        return _unknown_key((match[1] or match[2]).lstrip("-").partition("=")[0], options)
    if match := re.search(r'Linked "([\w.]+)" must be given via "([\w.]+)"', cause):
        return f"{match[1]} can't be set: it follows from {match[2]}; leave it out"
    if (match := re.search(r"Option '([\w.]+)' is not accepted", cause)) and (path := re.search(CLASS_PATH, cause)):
        return _unknown_argument(key, match[1], path[1])
    if match := re.search(r"arguments? (?:are|is) required: (.*?)(?:\. Got value: .*)?$", cause, re.MULTILINE):
        if (path := re.search(CLASS_PATH, cause)) and import_class(path[1]) in PARTS.values():
            return f"{key} {path[1]}: this is what all of them are; give one\n{_valid(key)[1]}"
        names = [name.strip() for name in match[1].split(",")]
        missing = ", ".join(f"{key}.{name}" if key else name.partition(".")[2] for name in names)
        return f"{missing} missing: give it as a flag, or a --config that has it"
    if found := re.findall(r"Literal\[([^\]]*)\]", cause):
        choices = ", ".join(dict.fromkeys(", ".join(found).replace("'", "").split(", ")))
        number = "true, false, or " if "<class 'bool'>" in cause else ""
        number += "a number, or " if re.search(r"Union\[[^\]]*float|<class 'float'>", cause) else ""
        return f"{key} {_value(cause)}: expected {number}one of {choices}"
    if (match := re.search(r"Expected '([\w.]+)' to be a subclass of <class '(\w+)'>", cause)) or (
        match := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", cause)
    ):
        return f"{key} {match[1]}: this class is no {match[2]}; give one that is"
    if "object has no attribute 'keys'" in cause:
        return f"{key}.init_args: expected lines 'name: value'"
    if match := re.search(r"Importing '([\w.]+)' is not allowed", cause):
        return f"{key} {match[1]}: it could run any code, so it isn't accepted; give a class made for this place"
    if "instantiatable class, but is abstract" in cause:
        return f"{key} {_abstract(_value(cause))}"
    kinds = re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>", cause)
    kinds = re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>\. Got value", cause) or kinds
    dotted = re.search(r"Expected a dot import path string: (\S+?)\.?(?:\s|$)", cause)
    if dotted and not set(kinds) & SCALARS.keys():
        return _unknown_class(key, dotted[1])
    if set(kinds) & KINDS.keys() - {"NoneType"}:
        expected = " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds if kind in KINDS))
        return f"{key} {_value(cause)}: expected {expected}"
    if match := re.search(r"No module named '([\w.]+)'|has no attribute .*?Got value: ", cause):
        return _unknown_class(key, _value(cause), match[1])
    if not key:
        return " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))
    value = _value(cause)
    if re.match(r"Namespace\(|NestedArg\(|\{", value) and key.rpartition(".")[2] in (*PARTS, *NORMALIZATIONS):
        named = f"write class_path: NAME and init_args: below it, or give --{key} NAME"
        return f"{key}: no class is named; {named}\n{_valid(key)[1]}"
    return f"{key} {value}: not accepted; --help says what is"


def not_settings(group: str, value: object, options: Iterable[str]) -> str:
    """Say that a group of options was given one value."""
    inner = [option for option in options if option.startswith(f"{group}.") and not option.endswith(".help")]
    return f"{group} {value}: expected settings, such as {inner[0] if inner else 'name: value'}"


def _value(cause: str) -> str:
    found = re.search(r"(?:Got value|Given value): (.*?)(?:\. Got value.*)?$", cause, re.MULTILINE)
    path = re.match(rf"(?:Namespace\(|\{{'){CLASS_PATH}", found[1]) if found else None
    return path[1] if path else found[1] if found else ""


def _unknown_key(key: str, options: Iterable[str]) -> str:
    if key.endswith((".yaml", ".yml")):
        return f"{key}: a configuration is given by --config {key}"
    options = [*options, *(f"data.{name}" for name in parameters_of(ClassificationData) if name != "classes")]
    inner = {option.rpartition(".")[2]: option for option in [*options, "model.optimizer.lr"]}
    return f"{key}: no such option{closest(key, options) or closest(key, inner, of=inner)}"


def _unknown_argument(key: str, name: str, path: str) -> str:
    if name == "class_path":
        return f"{key} {path.rpartition('.')[2]}: its arguments stand beside class_path; put them under init_args:"
    valid = [argument for argument in _arguments_of(path) if argument != name]
    listed = f"valid: {', '.join(valid)}" if valid else "it takes none"
    return f"{key}.{name}: {path.rpartition('.')[2]} has no argument {name}{closest(name, valid)}\n{listed}"


def _abstract(name: str) -> str:
    try:
        return abstract(import_class(name))
    except UserError:  # A name without its module.
        return f"{name} is abstract: name a subclass of it"


def _unknown_class(key: str, name: str, module: str | None = None) -> str:
    valid, listed = _valid(key)
    if module is None:
        remedy = closest(name.rpartition(".")[2], valid)
    else:
        remedy = f": Python finds no module {module}; run from the folder that has it, or install it"
    return f"{key} {name}: no class of this name{remedy}" + (f"\n{listed}" if listed else "")


def _valid(key: str) -> tuple[list[str], str]:
    """The classes that a key may name, and a line that lists them; nothing for a key that is unknown here."""
    part = key.rpartition(".")[2]
    if part in NORMALIZATIONS:
        names, more = list(registered()), "the dotted path of a class, or one registered by --plugins MODULE"
    else:
        base = PARTS.get(part)
        names, more = [cls.__name__ for cls in _concrete(base) if cls is not base], "the dotted path of a class"
    return names, f"valid: {', '.join(sorted(set(names)))}; {more}" if names else ""


def _concrete(base: type | None) -> list[type]:
    if base is None:
        return []
    children: list[type] = type.__subclasses__(base)
    below = [cls for child in children for cls in _concrete(child)]
    return below if inspect.isabstract(base) or base.__name__.startswith("_") else [base, *below]


def _arguments_of(path: str) -> list[str]:
    # A backbone's first argument is supplied by the task.
    return [name for name in parameters_of(import_class(path)) if name not in ("normalization", "classes", "params")]


def closest(name: str, valid: Iterable[str], of: Mapping[str, str] | None = None) -> str:
    """Say "; did you mean X?" for the valid name that is most like this one, or nothing.

    Args:
        name: what was given.
        valid: what it may mean.
        of: what to say for each of these, themselves by default.
    """
    likeness = {option: SequenceMatcher(None, option.lower(), name.lower()).ratio() for option in valid}
    best = max(likeness, key=likeness.__getitem__, default="")
    return f"; did you mean {of[best] if of else best}?" if likeness.get(best, 0) >= LIKE else ""


def raise_with_remedy(error: RuntimeError) -> None:
    """Raise a RunError in place of an error of Lightning or PyTorch for which there is a remedy."""
    text = " ".join(str(error).split())
    for start, remedy in REMEDIES.items():
        if text.startswith(start):
            raise RunError(f"{text.rstrip('.')}; {remedy}") from error


def root_cause(error: BaseException) -> BaseException:
    """What a class itself said, under the parser's own words; the innermost message meant for users if there is one."""
    chain = [error]
    while (inner := _inner(chain[-1])) is not None:
        chain.append(inner)
    meant = [link for link in chain if isinstance(link, UserError)]
    return meant[-1] if meant else chain[-1]


def _inner(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)
