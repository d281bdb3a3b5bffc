"""What every modality shares: three splits of labelled samples and the loaders over them."""

import os
import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sinkformer_pl.batch import Batch, pad
from sinkformer_pl.data.sampling import Draw, EpochSampler
from sinkformer_pl.errors import UserError

Split = Literal["train", "val", "test"]

_ROUNDS = 4


class Sample(NamedTuple):
    """One item of a dataset.

    Attributes:
        inputs: (N, C) float or (N,) int64; N may differ from sample to sample.
        target: class index.
        index: place of the sample in its split.
    """

    inputs: Tensor
    target: int
    index: int  # type: ignore[assignment]


class LabelledDataset(Dataset[Sample], ABC):
    """One split: a subclass writes `inputs`.

    Attributes:
        targets: (n,) int64 class indices.
        names: n names, for prediction files and messages.
    """

    def __init__(self, targets: Tensor, names: Sequence[str]) -> None:
        """Keep targets and names, both in the order of the samples."""
        self.targets = targets
        self.names = names

    @abstractmethod
    def inputs(self, draw: Draw) -> Tensor:
        """Return sample `draw.index`, everything random about it taken from `draw.seed` alone."""

    @property
    def lengths(self) -> Sequence[int] | None:
        """The n sizes of the inputs, where training batches are to hold samples of similar size; None by default."""
        return None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.targets)

    def __getitem__(self, draw: Draw | int) -> Sample:
        """Return a sample; a plain index, which Lightning's `overfit_batches` asks for, is its own seed."""
        if not isinstance(draw, Draw):
            draw = Draw(index=draw, seed=draw)
        return Sample(self.inputs(draw), int(self.targets[draw.index]), draw.index)


def collate(samples: Sequence[Sample]) -> Batch:
    """Make a batch, padding inputs of unequal length."""
    inputs, targets, indices = zip(*samples, strict=True)
    padded, mask = pad(inputs)
    return Batch(padded, mask, torch.tensor(targets), torch.tensor(indices))


def stratified_split(
    targets: Tensor, *, val_fraction: float, seed: int, groups: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Divide samples into training and validation, each class in proportion.

    Args:
        targets: (n,) int64 class indices.
        val_fraction: share of validation samples, in (0, 1).
        seed: non-negative; the division depends on it, `targets` and `groups` alone.
        groups: the n samples' groups, none of which is divided; None where each sample is one of its own.

    Returns:
        Sorted indices of the training and of the validation samples, disjoint and complete: `val_fraction * n`,
        rounded, for validation, but for the rule that a class with two samples or more has one in each part (and a
        class with a single one has it in training). With groups, each class is about as near to its share as
        whole groups allow, and those with two groups or more are in both parts where possible.
    """
    rng = np.random.default_rng(seed)
    labels = targets.numpy()
    if groups is not None:
        taken = _choose_groups(labels, groups, val_fraction, rng)
        return torch.from_numpy(np.flatnonzero(~taken)), torch.from_numpy(np.flatnonzero(taken))
    classes, counts = np.unique(labels, return_counts=True)
    shares = val_fraction * counts
    sizes = np.floor(shares).astype(int)
    # Largest remainders first, so that the total comes out as asked for.
    missing = round(val_fraction * len(labels)) - int(sizes.sum())
    sizes[np.argsort(sizes - shares, kind="stable")[:missing]] += 1
    sizes = np.where(counts >= 2, np.clip(sizes, 1, counts - 1), 0)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:size] for label, size in zip(classes, sizes, strict=True)
    ]
    val = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
    train = np.setdiff1d(np.arange(len(labels)), val)
    return torch.from_numpy(train), torch.from_numpy(val)


def _choose_groups(
    labels: np.ndarray, groups: Sequence[str], val_fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Return which samples are for validation."""
    numbers: dict[str, int] = {}
    members = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    counts = np.zeros((len(numbers), int(labels.max(initial=-1)) + 1))
    np.add.at(counts, (members, labels), 1)
    missing = val_fraction * counts.sum(axis=0)
    taken = np.zeros(len(numbers), dtype=bool)
    # Later rounds give back and exchange what the first took by chance.
    for group in np.concatenate([rng.permutation(len(numbers)) for _ in range(_ROUNDS)]):
        left = missing + counts[group] if taken[group] else missing - counts[group]
        if (left**2).sum() < (missing**2).sum() and (taken[group] or taken.sum() < len(numbers) - 1):
            taken[group] = ~taken[group]
            missing = left
    # A class that is all in training gives up its smallest group, one that is all in validation takes it back.
    for label in range(counts.shape[1]):
        having = np.flatnonzero(counts[:, label])
        if len(having) >= 2 and (taken[having].all() or not taken[having].any()):
            smallest = having[counts[having].sum(axis=1).argmin()]
            taken[smallest] = ~taken[smallest]
    return taken[members]


class ResumableLoader(DataLoader[Sample]):
    """A loader that begins an epoch where the training is, and not before the first batch is asked for.

    Lightning makes the iterator before it knows the epoch and the batch at which a training goes on; workers that
    began to fetch then would fetch those of epoch 0.

    Args:
        args: those of a DataLoader, with an `EpochSampler`.
        position: returns the number of batches of this epoch that the training has had.
        kwargs: see args.
    """

    def __init__(self, *args: Any, position: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.position = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches that are left of the epoch."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = self.position() * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the training's; that there is this method tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, see `state_dict`."""


class ClassificationData(pl.LightningDataModule, ABC):
    """Base of all data: a subclass passes its class names to `__init__` and writes `make_datasets`.

        class MyData(ClassificationData):
            def __init__(self, root: str, **kwargs: Any) -> None:
                super().__init__(["cat", "dog"], **kwargs)  # cheap: nothing is read here

            def make_datasets(self) -> dict[Split, LabelledDataset]:
                ...  # read, divide with `stratified_split`, return "train", "val" and "test"

    Attributes:
        classes: class names; a target is an index into them.
        num_classes: their number; both are known right after construction, so that a model can be built from them.
        datasets: the three splits, empty before `setup`.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Check the arguments; nothing is read or written.

        Args:
            classes: class names in the order of their indices, two or more.
            batch_size: samples per batch and process.
            num_workers: loader processes per split; the samples are the same for any number.
            val_fraction: share of the training samples that is kept for validation, in (0, 1).
            seed: of the division, the order and everything random about a sample.

        Raises:
            UserError: an argument out of its range, or fewer than two classes.
        """
        super().__init__()
        for name, value, valid, expected in (
            ("batch_size", batch_size, batch_size >= 1, "1 or more"),
            ("num_workers", num_workers, num_workers >= 0, "0 or more"),
            ("val_fraction", val_fraction, 0 < val_fraction < 1, "a share between 0 and 1, both excluded"),
            ("seed", seed, 0 <= seed < 2**63, "0 or more, below 2**63"),
        ):
            if not valid:
                raise UserError(f"data.{name} is {value}: give {expected}")
        if len(classes) < 2:
            raise UserError(f"the data has {len(classes)} classes ({', '.join(classes)}): give data of two or more")
        if len(set(classes)) < len(classes):
            raise UserError(f"the data has two classes of one name ({', '.join(classes)}): give each its own")
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.seed = seed
        self.datasets: dict[Split, LabelledDataset] = {}

    @abstractmethod
    def make_datasets(self) -> Mapping[Split, LabelledDataset]:
        """Read the data and return the splits "train", "val" and "test"; called once, on every process."""

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Take from a checkpoint what the meaning of its model's inputs depends on; nothing by default.

        Lightning restores the state of data of the same class; this is for the model's evaluation on other data.

        Args:
            checkpoint: Lightning's dictionary.

        Raises:
            UserError: something is missing.
        """

    def setup(self, stage: str | None = None) -> None:
        """Fill `datasets`, all three splits whatever the stage; once, however often Lightning asks.

        Raises:
            UserError: a split without samples. A class without samples in a split is only warned about.
        """
        if self.datasets:
            return
        datasets = dict(self.make_datasets())
        for split, dataset in datasets.items():
            if not len(dataset):
                raise UserError(f"the {split} split has no samples: give more data or another data.val_fraction")
            counts = torch.bincount(dataset.targets, minlength=self.num_classes)
            absent = [name for name, count in zip(self.classes, counts.tolist(), strict=True) if not count]
            if absent:
                warnings.warn(
                    f"{len(absent)} of {self.num_classes} classes have no sample in the {split} split: "
                    f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}",
                    stacklevel=2,
                )
        self.datasets = datasets

    def names(self, split: Split) -> Sequence[str]:
        """Return the name of each sample of a split, in the order of `Batch.index`; after `setup`."""
        return self.datasets[split].names

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return shuffled batches, other ones each epoch.

        The last, incomplete batch is kept unless it holds a single sample, of which batch statistics make nothing.
        """
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return each validation sample once, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return each test sample once, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return the test samples."""
        return self._loader("test")

    def _loader(self, split: Split) -> DataLoader[Sample]:
        training = split == "train"
        sampler = EpochSampler(
            len(self.datasets[split]),
            seed=self.seed,
            shuffle=training,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            lengths=self.datasets[split].lengths if training else None,
            batch_size=self.batch_size,
        )
        return ResumableLoader(
            self.datasets[split],
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            drop_last=training and len(sampler) > 1 and len(sampler) % self.batch_size == 1,
            worker_init_fn=_heed_the_training_alone,
            # Of its own: a seed for the workers is drawn at each start, which a training that goes on has more of.
            generator=torch.Generator().manual_seed(self.seed),
            position=self._position,
        )

    def _position(self) -> int:
        """How many batches of its epoch a training has had; 0 in evaluations."""
        return self.trainer.fit_loop.batch_idx + 1 if self.trainer and self.trainer.training else 0


def _heed_the_training_alone(worker: int) -> None:
    """Keep a worker alive when a signal comes to all processes of a terminal or a job: the training ends it."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(by: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != by:
        pass
    os._exit(0)
