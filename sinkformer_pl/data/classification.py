"""Share between modalities three splits of labelled samples and the loaders over them."""

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sinkformer_pl.batch import Sample
from sinkformer_pl.class_weights import ClassWeights
from sinkformer_pl.data.dataset import LabelledDataset, Split
from sinkformer_pl.data.identity import identity_of, require_same
from sinkformer_pl.data.loading import ResumableLoader, default_workers
from sinkformer_pl.data.preprocessing import Preprocessing, warn_of_differences
from sinkformer_pl.data.reading import is_utf8
from sinkformer_pl.data.sampling import EpochSampler
from sinkformer_pl.data.splitting import stratified_split
from sinkformer_pl.data.targets import counts_of, renumber, require_targets, sample_weights
from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_content import LEARNT_KEY, learnt_from, samples_from
from sinkformer_pl.training.checkpoint_match import require_classes
from sinkformer_pl.training.lightning_state import batches_done


class ClassificationData(pl.LightningDataModule, ABC):
    """Samples of some classes in three splits; a subclass passes class names to `__init__`, writes `make_datasets`.

        class MyData(ClassificationData):
            def __init__(self, root: str, **kwargs: Any) -> None:
                super().__init__(["cat", "dog"], **kwargs)  # cheap: nothing is read here

            def make_datasets(self) -> dict[Split, LabelledDataset]:
                ...  # read, divide with `stratified_split`, return "train", "val" and "test"

    What is learnt from data in training is kept in checkpoints (`learnt`) and taken from there when their model is
    evaluated or trained on, whatever the data are then: class names, and `preprocessing`.

    Attributes:
        classes: class names; a target is an index into them.
        num_classes: their number; both are known right after construction, so that a model can be built from them.
        found_classes: those of the data, which are other ones than those of a checkpoint where classes are absent or
            in another order. The targets that `make_datasets` gives are indices into them.
        multi_label: whether a sample has any number of classes; its target is then a row of bools, one for each. A
            subclass sets it in its `__init__`, behind `super().__init__`; False by default.
        preprocessing: of evaluation; None where a subclass has no such thing.
        preprocessing_class: its class, likewise.
        datasets: the three splits, empty before `setup`.
    """

    preprocessing_class: ClassVar[type[Preprocessing] | None] = None

    def __init__(
        self,
        classes: Sequence[str],
        *,
        batch_size: int = 32,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        sampling: ClassWeights | None = None,
    ) -> None:
        """Check the arguments; nothing is read or written.

        Args:
            classes: class names in the order of their indices, two or more; one to be evaluated.
            batch_size: samples per batch and process, below 2**31.
            num_workers: loader processes per split; the samples are the same for any number. None is 0 on the CPU and
                on a GPU one less than the CPUs of each training process, at most 8.
            pin_memory: whether batches lie in page-locked memory, from which a GPU copies while it computes; None is
                where there is a GPU.
            val_fraction: share of the training samples that is kept for validation, in (0, 1).
            seed: of the division, the order and everything random about a sample.
            sampling: how training samples are drawn, with replacement: "balanced", all classes alike; or in proportion
                to the weight of their class, a list in the order of the classes or weights by name (1 for the others).
                None draws each sample once an epoch.

        Raises:
            UserError: an argument out of its range, no class, or names that don't tell them apart.
        """
        super().__init__()
        for name, value, valid, expected in (
            ("batch_size", batch_size, 1 <= batch_size < 2**31, "1 or more, below 2**31"),
            ("num_workers", num_workers, num_workers is None or num_workers >= 0, "0 or more, or null"),
            ("val_fraction", val_fraction, 0 < val_fraction < 1, "a share between 0 and 1, both excluded"),
            ("seed", seed, 0 <= seed < 2**63, "0 or more, below 2**63"),
        ):
            if not valid:
                raise UserError(f"data.{name} is {value}: give {expected}")
        if not classes:
            raise UserError(f"{self.origin}: no classes; give data of two or more")
        for name, count in Counter(classes).items():
            if count > 1:
                raise UserError(f"{self.origin}: {count} classes of one name, {name}; give each its own")
            if not is_utf8(name):
                raise UserError(f"{self.origin}: class {name!a} can't be written as UTF-8; rename it")
        self.classes = self.found_classes = tuple(classes)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.val_fraction = val_fraction
        self.seed = seed
        self.sampling = sampling
        self.multi_label = False
        self.preprocessing: Preprocessing | None = None
        self.datasets: dict[Split, LabelledDataset] = {}

    @property
    def num_classes(self) -> int:
        """The number of classes.

        Raises:
            UserError: one alone. Data of one class are evaluated as a checkpoint of several knows it.
        """
        if len(self.classes) == 1:
            raise UserError(f"{self.origin}: one class, {self.classes[0]}; give data of two or more")
        return len(self.classes)

    @property
    def origin(self) -> str:
        """Where the samples come from, for messages: `root`, where there is one."""
        return str(getattr(self, "root", type(self).__name__))

    @abstractmethod
    def make_datasets(self) -> Mapping[Split, LabelledDataset]:
        """Read the data and return the splits "train", "val" and "test"; called once, on every process."""

    @property
    def learnt(self) -> dict[str, Any]:
        """Give as plain data all that a checkpoint's model has learnt of its data beside weights, and of which data."""
        return {
            "classes": list(self.classes),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.plain(),
            "samples": self._identity(),
            "multi_label": self.multi_label,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, for a checkpoint; nothing before `setup`."""
        return {LEARNT_KEY: self.learnt} if self.datasets else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was learnt, as `restore` does; Lightning does so for data of the class that was trained on."""
        checkpoint = {type(self).__qualname__: state_dict}
        self.restore(checkpoint)
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and self.datasets and samples_from(checkpoint):
            self.require_same_samples(checkpoint, self.trainer.ckpt_path or "")  # type: ignore[union-attr]

    def require_same_samples(self, checkpoint: Mapping[str, Any], path: str | Path = "") -> None:
        """Check, after `setup`, that a training resumes on the samples, and with the division, of its checkpoint.

        Args:
            checkpoint: Lightning's dictionary.
            path: of the checkpoint, for messages.

        Raises:
            UserError: names, classes or content of training or validation samples differ, or in a checkpoint of an
                older version, which doesn't know them, what decides the division.
        """
        require_same(samples_from(checkpoint), self._identity(), path)

    def _identity(self) -> dict[str, Any]:
        return identity_of(self.datasets, self.classes, seed=self.seed, val_fraction=self.val_fraction)

    def restore(self, checkpoint: Mapping[str, Any], path: str | Path = "") -> None:
        """Take from a checkpoint what its model has learnt of its data, before `setup` or after it.

        Args:
            checkpoint: Lightning's dictionary.
            path: of the checkpoint, for messages.

        Raises:
            UserError: something is missing, or these data have classes that the checkpoint doesn't know.
        """
        learnt = learnt_from(checkpoint)
        require_classes(checkpoint, self.found_classes, path, multi_label=self.multi_label)
        before, self.classes = self.classes, tuple(learnt.get("classes") or self.classes)
        saved = learnt.get("preprocessing") or {}
        preprocessing = self.preprocessing_of(saved)
        if preprocessing is not None:
            warn_of_differences(preprocessing, saved)
        renumber(self.datasets, before, self.classes)
        self._use(preprocessing)

    def take_over(self, learnt: Mapping[str, Any]) -> Sequence[str] | None:
        """Take over what a model has learnt of its data, from whose weights a new training of these data starts.

        The classes stay those of these data.

        Args:
            learnt: as `learnt_from` gives it; of data of another modality nothing is taken.

        Returns:
            What was taken: names of `Preprocessing.from_data`, but for defaults. None where the model's inputs aren't
            known.
        """
        saved, kind = learnt.get("preprocessing") or {}, self.preprocessing_class
        if kind is None or saved.get("kind", kind.kind) != kind.kind:
            return ()
        preprocessing = self.preprocessing_of(saved) if saved else None
        self._use(preprocessing)
        if preprocessing is None:
            return None
        return [name for name in kind.from_data if name in saved and saved[name] != getattr(kind, name, None)]

    def _use(self, preprocessing: Preprocessing | None) -> None:
        # Lightning restores once more after `setup`: what samples were made with, and kept, stays.
        if preprocessing is not None and preprocessing != self.preprocessing:
            self.preprocessing = preprocessing
            for dataset in self.datasets.values():
                dataset.use(preprocessing)

    def preprocessing_of(self, saved: Mapping[str, Any]) -> Preprocessing | None:
        """Return the preprocessing with what was learnt from data in training, the rest as the arguments say.

        Args:
            saved: `Preprocessing.plain()` of the data that a checkpoint's model was trained on; of any modality, and
                empty in checkpoints of older versions.

        Returns:
            None to learn it anew.
        """
        return None

    def setup(self, stage: str | None = None) -> None:
        """Fill `datasets`, all three splits whatever the stage; once, however often Lightning asks.

        Raises:
            UserError: a split that is missing or without samples, a target that is no class, or more classes than
                training samples. A class without samples in a split is only warned about.
        """
        if self.datasets:
            return
        datasets = self.make_datasets()
        if not isinstance(datasets, Mapping) or not all(
            isinstance(datasets.get(split), LabelledDataset) for split in get_args(Split)
        ):
            raise UserError(
                f"{type(self).__name__}.make_datasets: return a dictionary with a LabelledDataset for each of "
                f"{', '.join(get_args(Split))}"
            )
        if 0 < (samples := len(datasets["train"])) < len(self.found_classes) and not self.multi_label:
            raise UserError(
                f"{self.origin}: {len(self.found_classes)} classes, but {samples} training samples; give more "
                "samples, or correct the classes"
            )
        for split, dataset in datasets.items():
            if not len(dataset):
                raise UserError(f"{self.origin}: the {split} split has no samples; give some")
            number, owner = len(self.found_classes), type(self).__name__
            require_targets(dataset.targets, number, multi_label=self.multi_label, owner=owner, split=split)
        renumber(datasets, self.found_classes, self.classes)
        for split, dataset in datasets.items():
            counts = counts_of(dataset.targets, self.num_classes)
            absent = [name for name, count in zip(self.classes, counts.tolist(), strict=True) if not count]
            if absent:
                warnings.warn(
                    f"{len(absent)} of {self.num_classes} classes have no sample in the {split} split: "
                    f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}",
                    stacklevel=2,
                )
        self.datasets = dict(datasets)
        self._sample_weights()

    @property
    def class_counts(self) -> Tensor:
        """Count the training samples of each class, (num_classes,) int64; after `setup`."""
        return counts_of(self.datasets["train"].targets, self.num_classes)

    def _sample_weights(self) -> Tensor | None:
        targets = self.datasets["train"].targets
        return None if self.sampling is None else sample_weights(self.sampling, targets, self.classes)

    def _divide(
        self, targets: Tensor, groups: Sequence[Hashable] | None = None, *, unit: str = "samples"
    ) -> tuple[Tensor, Tensor]:
        """Divide training from validation samples as `stratified_split` does, by `val_fraction` and `seed`.

        Args:
            targets: (n,) int64 class indices.
            groups: the n samples' groups, none of which is divided.
            unit: what is divided, for the message.

        Raises:
            UserError: nothing is left for validation, since no class has two samples or groups.
        """
        train, val = stratified_split(targets, val_fraction=self.val_fraction, seed=self.seed, groups=groups)
        if len(train) and not len(val):
            raise UserError(f"{self.origin}: no class has two {unit}, one to train and one to validate on; give more")
        return train, val

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
            weights=self._sample_weights() if training else None,
            batch_size=self.batch_size,
        )
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        workers = self.num_workers
        if workers is None:
            workers = default_workers(self.trainer.num_devices) if on_gpu else 0  # type: ignore[union-attr]
        return ResumableLoader(
            self.datasets[split],
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_gpu if self.pin_memory is None else self.pin_memory,
            drop_last=training and len(sampler) > 1 and len(sampler) % self.batch_size == 1,
            # Of its own: a seed for the workers is drawn at each start, which a training that goes on has more of.
            generator=torch.Generator().manual_seed(self.seed),
            position=self._position,
        )

    def _position(self) -> int:
        """How many batches of its epoch a training has had; 0 in evaluations."""
        return batches_done(self.trainer) if self.trainer and self.trainer.training else 0
