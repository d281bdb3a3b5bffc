"""Blocks that share their graphs, sizes that are few, and the numbers of the network as it is written."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from sinkformer_pl.backbones import TimmBackbone
from sinkformer_pl.callbacks import Compile
from sinkformer_pl.callbacks.compile import blocks, next_size
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import PointCloudTransformer, SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier


class Graphs:
    """A backend that runs a graph as it is, and notes the sizes of its inputs."""

    def __init__(self):
        self.sizes = []

    def __call__(self, graph, inputs):
        self.sizes.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor) and i.ndim == 3])
        return graph.forward


def trained(*callbacks, **options):
    torch.compiler.reset()
    pl.seed_everything(0)
    network = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)
    model = Classifier(network, Softmax, 12, optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    data = ProceduralShapes(train_size=32, val_size=12, test_size=12, batch_size=8, min_points=98)
    trainer.fit(model, data)
    return model


def test_blocks_of_a_kind_share_one_graph_and_the_numbers_stay():
    graphs = Graphs()
    compiled, plain = trained(Compile(backend=graphs)), trained()
    # Sets of 98 to 112 points, of other sizes in each batch, in two blocks.
    [sizes] = graphs.sizes
    assert (8, 128, 8) in sizes
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_padding_there_are_more_graphs():
    graphs = Graphs()
    trained(Compile(backend=graphs, pad=False))
    assert len(graphs.sizes) > 1


def test_afterwards_nothing_is_padded_and_what_is_compiled_runs_compiled():
    model = trained(Compile(backend=Graphs()), max_steps=1)
    seen = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    with torch.compiler.set_stance("force_eager"):
        model.train()(torch.randn(2, 50, 3), torch.ones(2, 50, dtype=torch.bool))
    assert seen == [50]

    class Fails(pl.Callback):
        def on_validation_batch_start(self, *args):
            raise KeyError

    with pytest.raises(KeyError):
        trained(Compile(backend=Graphs()), Fails())
    later = Graphs()
    torch.compile(lambda x: x + 1, backend=later)(torch.ones(1, 1, 1))
    assert later.sizes == [[(1, 1, 1)]]


def test_a_network_that_learns_positions_is_padded_to_their_number_at_most():
    class Text(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = TextTransformer(Softmax, vocab_size=20, max_length=40, dim=8, num_heads=2, dropout=0.0)

    module, callback = Text().train(), Compile(backend=Graphs())
    callback.on_fit_start(None, module)
    seen = []
    module.backbone.encoder.register_forward_pre_hook(lambda encoder, args: seen.append(args[0].shape[1]))
    tokens, mask = torch.randint(20, (2, 35)), torch.arange(35) < torch.tensor([[35], [9]])
    padded = module.backbone(tokens, mask)
    torch.testing.assert_close(padded, module.backbone.eval()(tokens, mask))
    # Samples of one size have no mask.
    module.backbone.train()(tokens)
    assert seen == [40, 35, 35]


def test_what_is_a_block():
    for network in (SetTransformer, VisionTransformer, TextTransformer, PointCloudTransformer):
        made = network(Softmax)
        assert {id(b) for b in blocks(made)} == {id(b) for b in getattr(made, "blocks", None) or made.encoder.blocks}
    made = TimmBackbone(Softmax, "vit_tiny_patch16_224", arguments={"embed_dim": 24, "depth": 2})
    assert blocks(made) == list(made.network.blocks)
    other = nn.Sequential(nn.Linear(2, 2))
    assert blocks(other) == [other]


def test_sizes_are_few_and_at_most_half_too_large():
    assert sorted({next_size(n) for n in range(1, 257)}) == [16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(n <= next_size(n) <= 1.5 * n for n in range(16, 2000))
