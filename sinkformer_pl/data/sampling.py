"""In which order samples are drawn, and the seed that makes each draw's randomness reproducible."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DistributedSampler

from sinkformer_pl.errors import UserError

_LONGEST_WINDOW = 50
_FEWEST_WINDOWS = 4


class Draw(NamedTuple):
    """What a dataset is asked for: which sample, and the seed of everything random about it this time.

    Attributes:
        index: place of the sample in its split.
        seed: non-negative, below 2**63.
        counted: False for a draw that is there only so that all processes take equally many steps.
    """

    index: int  # type: ignore[assignment]
    seed: int
    counted: bool = True


class EpochSampler(DistributedSampler):
    """One rank's draws of an epoch; as a `DistributedSampler` it is one that Lightning leaves as it is.

    The order and every draw's seed are functions of (seed, epoch, index) alone, so that a run gives the same samples
    for any number of loader workers, and the same set of them for any number of ranks.

    Training (`shuffle`): another order and other seeds each epoch; up to `world_size - 1` samples are left out, since
    a rank with a batch more than another would wait for it forever. With `weights`, an epoch is as many draws with
    replacement, each in proportion to its weight; a seed is then of (seed, epoch, place in the epoch), so that a sample
    that is drawn twice isn't changed in the same way twice. With `lengths`, the samples of a batch, over all
    ranks, are of similar length: they are shuffled, sorted by length within windows of some batches, and the batches
    shuffled; an incomplete batch stays the last.
    Evaluation, whatever the epoch: the batches of a single process, in order, dealt to the ranks in turn; so a sample
    meets the same others for any number of ranks, and its outputs are the same to the last bit. Each sample is counted
    exactly once. A rank that gets no batch in the last round draws one sample that isn't counted, since a model
    that is divided over the ranks needs all of them at every step.

    Attributes:
        start: number of draws to leave out at the beginning of the epoch, 0 unless it goes on where it was cut off.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        lengths: Sequence[int] | None = None,
        weights: Sequence[float] | Tensor | None = None,
        batch_size: int = 1,
    ) -> None:
        """Prepare epoch 0.

        Args:
            size: number of samples of the split, over all ranks.
            seed: non-negative seed of the run.
            shuffle: True for training, False for evaluation.
            rank: this process's place, 0 <= rank < world_size.
            world_size: number of processes that share the split.
            lengths: of each sample of the split; without meaning for evaluation.
            weights: of each sample of the split, 0 or more, some above 0; likewise. None draws each sample once.
            batch_size: draws per batch and process.

        Raises:
            UserError: training with fewer samples than ranks.
        """
        if shuffle and size < world_size:
            raise UserError(f"{size} training samples for {world_size} processes: use fewer devices or more data")
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self.batch_size = batch_size
        self.start = 0

    def __len__(self) -> int:
        """Return this rank's number of draws in a whole epoch, the same every epoch."""
        if self.shuffle:
            return self.size // self.num_replicas
        own, idle = self._dealt()
        return len(own) + idle

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        """Yield this rank's draws, from `start` on."""
        entropy = (self.seed, self.epoch if self.shuffle else 0)
        # Halved, since torch takes seeds as signed 64-bit integers.
        seeds = np.random.SeedSequence(entropy).generate_state(self.size, np.uint64) >> np.uint64(1)
        first = seeds[:1]
        if self.shuffle:
            order, idle = self._shuffled(np.random.default_rng(entropy)), False
            # Seeds of places in the epoch, where a sample may come more than once.
            seeds = seeds[order] if self.weights is None else seeds
            own = np.arange(self.size)[self.rank :: self.num_replicas][: len(self)]
            order, seeds = order[own], seeds[own]
        else:
            order, idle = self._dealt()
            seeds = seeds[order]
        for index, seed in zip(order[self.start :].tolist(), seeds[self.start :].tolist(), strict=True):
            yield Draw(index, seed)
        if idle:
            yield Draw(0, int(first[0]), counted=False)

    def _dealt(self) -> tuple[np.ndarray, bool]:
        """This rank's samples of an evaluation, and whether it has no batch in the last round."""
        order = np.arange(self.size)
        batches = -(-self.size // self.batch_size)
        idle = 0 < batches % self.num_replicas <= self.rank
        return order[order // self.batch_size % self.num_replicas == self.rank], idle

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        if self.weights is None:
            order = rng.permutation(self.size)
        else:
            order = rng.choice(self.size, self.size, p=self.weights / self.weights.sum())
        # Of all ranks together, since they draw in turn: their batches of one step are then equally long.
        batch = self.batch_size * self.num_replicas
        batches = self.size // batch
        if self.lengths is None or batches < 2:
            return order
        # Few windows would give the same neighbours every epoch.
        window = batch * min(_LONGEST_WINDOW, max(batches // _FEWEST_WINDOWS, 1))
        full, rest = order[: batches * batch], order[batches * batch :]
        windows = [full[start : start + window] for start in range(0, len(full), window)]
        by_length = [part[np.argsort(self.lengths[part], kind="stable")] for part in windows]
        return np.concatenate([rng.permutation(np.concatenate(by_length).reshape(batches, batch)).ravel(), rest])
