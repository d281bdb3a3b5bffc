"""Initial weights from a file: what is loaded, what is interpolated, what is new, what is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sinkformer_pl import Classifier, init_from
from sinkformer_pl.batch import Batch
from sinkformer_pl.data import ClassificationData, Digits, TextTable
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import Backbone, PointCloudTransformer, SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.normalizations import Entmax, SemiUnbalancedSinkhorn, Sinkhorn, Softmax

IMAGES = partial(VisionTransformer, image_size=8, patch_size=2, channels=1, dim=8, num_heads=2, depth=2, mlp_dim=8)
TEXTS = partial(TextTransformer, vocab_size=300, max_length=10, dim=8, num_heads=2, depth=1, mlp_dim=8)
SETS = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)


def made(seed: int, backbone=IMAGES, normalization=Softmax, num_classes: int = 10, **arguments) -> Classifier:
    torch.manual_seed(seed)
    model = Classifier(backbone, normalization, num_classes, **arguments)
    with torch.no_grad():
        # What starts from zeros and ones is told apart from what was loaded, too.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model: Classifier, path: Path, data: ClassificationData | None = None) -> Path:
    """Write what a Trainer's checkpoint holds of a model and its data."""
    content = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": "2.6.6",
    }
    if data is not None:
        data.setup()
        content[type(data).__qualname__] = data.state_dict()
    torch.save(content, path)
    return path


def same(a: nn.Module, b: nn.Module, *, but: tuple[str, ...] = ()) -> bool:
    """Tell whether all is equal but for some names, in which nothing is."""
    there, here = a.state_dict(), b.state_dict()
    assert there.keys() == here.keys()
    return all(torch.equal(there[name], here[name]) != name.startswith(but) for name in there)


def test_all_weights_are_those_of_the_file_and_so_is_the_first_loss(tmp_path):
    source, target = made(0), made(1)
    batch = Batch(torch.randn(4, 1, 8, 8), None, torch.tensor([0, 1, 2, 9]), torch.arange(4))
    done = init_from(target, saved(source, tmp_path / "a.ckpt"))
    assert same(source, target)
    assert torch.equal(source.training_step(batch, 0), target.training_step(batch, 0))
    assert (
        str(done)
        == f"initialised from {tmp_path}/a.ckpt: {len(source.state_dict())} of "
        + str(len(source.state_dict()))
        + " tensors"
    )


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "lightning"])
def test_plain_weights_by_name_are_read_whatever_wrote_them(tmp_path, form):
    source, target = made(0), made(1)
    if form == "safetensors":
        save_file(source.state_dict(), tmp_path / "a.safetensors")
    else:
        content = source.state_dict()
        torch.save({"state_dict": content, "epoch": 3} if form == "lightning" else content, tmp_path / "a.pth")
    [path] = tmp_path.iterdir()
    init_from(target, path)
    assert same(source, target)


def test_statistics_of_batch_norms_are_loaded(tmp_path):
    clouds = partial(PointCloudTransformer, dim=8, depth=1, centres=(), fused_dim=8, head_dims=(8,))
    source, target = made(0, clouds), made(1, clouds)
    source.train()(torch.randn(3, 9, 3))
    done = init_from(target, saved(source, tmp_path / "a.ckpt"))
    assert "backbone.fuse.norm.running_mean" in done.loaded
    assert same(source, target)


@pytest.mark.parametrize("named", [True, False])
def test_the_head_of_other_classes_is_new(tmp_path, named):
    source = made(0, num_classes=10)
    path = saved(source, tmp_path / "a.ckpt", Digits() if named else None)
    target = made(1, num_classes=10 if named else 3)
    before = target.head.weight.clone()
    data = Digits()
    data.classes = tuple("abcdefghij")
    done = init_from(target, path, data=data if named else None)
    assert same(source.backbone, target.backbone)
    assert torch.equal(target.head.weight, before)
    assert dict.fromkeys(done.new) == {"head.weight": None, "head.bias": None}
    assert "  new, of other classes: head" in done.lines()
    assert "  left out of the file: head" in done.lines()


def test_a_head_of_the_same_classes_is_loaded(tmp_path):
    source, target = made(0), made(1)
    init_from(target, saved(source, tmp_path / "a.ckpt", Digits()), data=Digits())
    assert same(source, target)


def grid(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a grid of positions, written out."""
    maps = positions.T.reshape(1, -1, *old)
    return F.interpolate(maps, size=new, mode="bicubic", antialias=True).flatten(2)[0].T


@pytest.mark.parametrize(
    ("old", "new", "sizes"),
    [
        (8, 12, ((4, 4), (6, 6))),
        (8, (6, 4), ((4, 4), (3, 2))),
        # As many patches, in another order.
        ((4, 16), 8, ((2, 8), (4, 4))),
    ],
)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_positions_of_another_image_size_are_interpolated_on_the_grid(tmp_path, old, new, sizes, pooling):
    source = made(0, partial(IMAGES, image_size=old, pooling=pooling))
    target = made(1, partial(IMAGES, image_size=new, pooling=pooling))
    done = init_from(target, saved(source, tmp_path / "a.ckpt"))
    there, here, first = source.backbone.positions, target.backbone.positions, int(pooling == "cls")
    assert torch.equal(here[:first], there[:first])
    assert torch.allclose(here[first:], grid(there[first:], *sizes), atol=1e-6)
    assert same(source.backbone.encoder, target.backbone.encoder)
    before, after = (f"{height} x {width}" for height, width in sizes)
    assert done.resized == {"backbone.positions": f"{before} to {after}"}
    assert done.lines()[1] == f"  resized: backbone.positions, {before} to {after}"


def test_positions_in_a_file_without_arguments_are_those_of_a_square(tmp_path):
    source, target = made(0), made(1, partial(IMAGES, image_size=(8, 12)))
    torch.save(source.state_dict(), tmp_path / "a.pt")
    init_from(target, tmp_path / "a.pt")
    assert torch.allclose(target.backbone.positions[1:], grid(source.backbone.positions[1:], (4, 4), (4, 6)), atol=1e-6)


def test_a_class_token_that_is_new_keeps_its_own_position(tmp_path):
    source, target = made(0, partial(IMAGES, pooling="mean")), made(1)
    own = target.backbone.positions[0].clone()
    done = init_from(target, saved(source, tmp_path / "a.ckpt"), strict=False)
    assert torch.equal(target.backbone.positions[0], own)
    assert torch.equal(target.backbone.positions[1:], source.backbone.positions)
    assert dict(done.new) == {"backbone.class_token.token": "not in the file"}


@pytest.mark.parametrize("length", [16, 6])
def test_positions_of_texts_are_interpolated_to_more_and_cut_to_fewer(tmp_path, length):
    source, target = made(0, TEXTS), made(1, partial(TEXTS, max_length=length))
    init_from(target, saved(source, tmp_path / "a.ckpt"))
    there, here = source.backbone.positions.table, target.backbone.positions.table
    wanted = F.interpolate(there.T[None], size=length, mode="linear")[0].T if length > 10 else there[:length]
    assert torch.equal(here, wanted)
    tokens = torch.randint(0, 300, (2, 6))
    # Cut, a text that is short enough has the outputs that it had.
    assert torch.equal(source.eval()(tokens), target.eval()(tokens)) == (length == 6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Softmax, partial(Entmax, learned=True)),
        (partial(Entmax, learned=True), partial(Sinkhorn, n_iters=3)),
        (partial(Entmax, learned=True), partial(SemiUnbalancedSinkhorn, learned=True)),
        # The number is learned in the one and given in the other.
        (Entmax, partial(Entmax, learned=True)),
    ],
)
def test_another_normalization_has_parameters_of_its_own(tmp_path, old, new):
    source, target = made(0, normalization=old), made(1, normalization=new)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    init_from(target, saved(source, tmp_path / "a.ckpt"))
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if ".normalization." in name else source.state_dict()[name]), name


def test_the_same_normalization_keeps_what_it_has_learned(tmp_path):
    source, target = (made(seed, normalization=partial(Entmax, learned=True)) for seed in (0, 1))
    init_from(target, saved(source, tmp_path / "a.ckpt"))
    assert any(".normalization." in name for name in source.state_dict())
    assert same(source, target)


class Sharpened(Entmax):
    """Another normalization, whose parameter has the same name."""


@pytest.mark.parametrize("known", [True, False])
def test_a_normalization_of_another_class_has_its_own_parameters_even_of_the_same_names(tmp_path, known):
    source = made(0, normalization=partial(Entmax, learned=True))
    target = made(1, normalization=partial(Sharpened, learned=True))
    name = "backbone.encoder.blocks.0.attention.core.normalization.alpha_logit"
    before = target.state_dict()[name].clone()
    path = saved(source, tmp_path / "a.ckpt")
    if not known:  # A file that doesn't say which class it was.
        torch.save(source.state_dict(), path)
    init_from(target, path)
    assert torch.equal(target.state_dict()[name], before if known else source.state_dict()[name])


def test_names_of_version_0_1_are_known(tmp_path):
    source, target = (made(seed, normalization=partial(Entmax, learned=True)) for seed in (0, 1))
    torch.save({name.replace(".core.", "."): value for name, value in source.state_dict().items()}, tmp_path / "a.pt")
    init_from(target, tmp_path / "a.pt")
    assert same(source, target)


def test_parts_by_name(tmp_path):
    source, target, untouched = made(0), made(1), made(1)
    path = saved(source, tmp_path / "a.ckpt")
    done = init_from(target, path, only=["backbone.embed", "backbone.encoder.blocks.1-1"])
    there, here, before = (model.state_dict() for model in (source, target, untouched))
    for name in here:
        taken = name.startswith(("backbone.embed.", "backbone.encoder.blocks.1."))
        assert torch.equal(here[name], (there if taken else before)[name]), name
        assert (name in done.loaded) == taken
    assert done.new == {}
    # Of a network with fewer blocks, since the others aren't asked for.
    init_from(made(1, partial(IMAGES, depth=1)), path, only="backbone.encoder.blocks.0")


def test_what_fits_is_loaded_where_all_needn_t(tmp_path):
    source = made(0)
    target = made(1, partial(IMAGES, depth=3, mlp_dim=12))
    with pytest.raises(UserError) as error:
        init_from(target, saved(source, tmp_path / "a.ckpt"))
    for words in (
        "backbone.depth is 2 in the checkpoint and 3 here",
        "backbone.mlp_dim is 8",
        "init_strict",
        "init_only",
    ):
        assert words in str(error.value)
    done = init_from(target, tmp_path / "a.ckpt", strict=False)
    there, here = source.backbone.encoder.blocks, target.backbone.encoder.blocks
    assert same(there[0].attention, here[0].attention)
    reasons = {reason: [name for name in done.new if done.new[name] == reason] for reason in done.new.values()}
    assert all(name.startswith("backbone.encoder.blocks.2.") for name in reasons["not in the file"])
    assert "backbone.encoder.blocks.0.mlp.0.weight" in reasons["of another shape in the file"]
    assert "  new, not in the file: backbone.encoder.blocks.2" in done.lines()


class Renamed(Backbone):
    """A network with none of the names of another."""

    def __init__(self, normalization) -> None:
        super().__init__()
        self.out_dim = 8
        self.project = nn.Linear(3, 8)

    def forward(self, inputs, mask=None):
        return self.project(inputs).mean(1)


NAN = torch.full((10,), float("nan"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(b"nothing"), ["a.ckpt", "damaged"]),
        (lambda path: path.unlink(), ["a.ckpt", "no such file"]),
        (lambda path: torch.save({"epoch": 3}, path), ["a.ckpt", "no weights by name", "state_dict"]),
        (lambda path: torch.save({"weight": torch.ones(2)}, path), ["names", "weight", "backbone.positions"]),
        (lambda path: torch.save({**made(0).state_dict(), "head.bias": NAN}, path), ["head.bias", "finite"]),
    ],
)
def test_files_without_usable_weights_are_refused_and_nothing_is_loaded(tmp_path, change, said):
    target, untouched = made(1), made(1)
    change(saved(made(0), tmp_path / "a.ckpt"))
    with pytest.raises(UserError) as error:
        init_from(target, tmp_path / "a.ckpt")
    for words in ("init_from", *said):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert same(target, untouched)


def test_weights_of_which_none_fits_are_refused(tmp_path):
    saved(made(0, num_classes=3), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt: of its weights none fits"):
        init_from(made(1, Renamed), tmp_path / "a.ckpt", strict=False)
    with pytest.raises(UserError, match=r"init_only backbone\.blocks.*backbone\.encoder\.blocks"):
        init_from(made(1), tmp_path / "a.ckpt", only="backbone.blocks")


def table(root: Path, words: str) -> TextTable:
    root.mkdir()
    for part in ("train", "test"):
        rows = [f"{words} {number},{label}\n" for number in range(8) for label in "ab"]
        (root / f"{part}.csv").write_text("text,label\n" + "".join(rows))
    return TextTable(root, vocab_size=300, max_length=10)


def test_a_tokenizer_comes_with_the_weights_that_know_it(tmp_path):
    there, here = table(tmp_path / "there", "one two three"), table(tmp_path / "here", "eight nine ten eight nine")
    path = saved(made(0, TEXTS, num_classes=2), tmp_path / "a.ckpt", there)
    done = init_from(made(1, TEXTS, num_classes=2), path, data=here)
    here.setup()
    assert here.tokenizer.to_str() == there.tokenizer.to_str()
    assert here.learnt["preprocessing"]["tokenizer"] == there.tokenizer.to_str()
    assert "  taken over for the data: tokenizer" in done.lines()


def test_mean_and_deviation_come_with_the_weights_but_not_the_size(tmp_path):
    there, here = Digits(train_size=10, seed=3), Digits(image_size=12)
    done = init_from(made(1, partial(IMAGES, image_size=12)), saved(made(0), tmp_path / "a.ckpt", there), data=here)
    here.setup()
    assert torch.equal(here.mean, there.mean)
    assert torch.equal(here.std, there.std)
    assert here.datasets["train"].preprocessing == here.preprocessing
    assert here.preprocessing.image_size == 12
    assert "  taken over for the data: mean, std" in done.lines()
    torch.save(made(0).state_dict(), tmp_path / "a.pt")
    alone = Digits()
    done = init_from(made(1), tmp_path / "a.pt", data=alone)
    assert "doesn't say how its inputs were made" in done.lines()[-1]
    alone.setup()
    assert not torch.equal(alone.mean, there.mean)
