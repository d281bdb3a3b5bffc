"""In which order samples are drawn, and the seed that makes each draw's randomness reproducible."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from sinkformer_pl.errors import UserError


class Draw(NamedTuple):
    """What a dataset is asked for: which sample, and the seed of everything random about it this time.

    Attributes:
        index: place of the sample in its split.
        seed: non-negative, below 2**63.
    """

    index: int  # type: ignore[assignment]
    seed: int


class EpochSampler(DistributedSampler):
    """One rank's draws of an epoch; as a `DistributedSampler` it is one that Lightning leaves as it is.

    The order and every draw's seed are functions of (seed, epoch, index) alone, so that a run gives the same samples
    for any number of loader workers, and the same set of them for any number of ranks.

    Training (`shuffle`): another order and other seeds each epoch; up to `world_size - 1` samples are left out, since
    a rank with a batch more than another would wait for it forever.
    Evaluation: samples in order, each exactly once over all ranks (ranks may differ by one), whatever the epoch.
    """

    def __init__(self, size: int, *, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        """Prepare epoch 0.

        Args:
            size: number of samples of the split, over all ranks.
            seed: non-negative seed of the run.
            shuffle: True for training, False for evaluation.
            rank: this process's place, 0 <= rank < world_size.
            world_size: number of processes that share the split.

        Raises:
            UserError: training with fewer samples than ranks.
        """
        if shuffle and size < world_size:
            raise UserError(f"{size} training samples for {world_size} processes: use fewer devices or more data")
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size = size

    def __len__(self) -> int:
        """Return this rank's number of draws, the same every epoch."""
        if self.shuffle:
            return self.size // self.num_replicas
        return len(range(self.rank, self.size, self.num_replicas))

    def __iter__(self) -> Iterator[Draw]:  # type: ignore[override]
        """Yield this rank's draws."""
        entropy = (self.seed, self.epoch if self.shuffle else 0)
        # Halved, since torch takes seeds as signed 64-bit integers.
        seeds = np.random.SeedSequence(entropy).generate_state(self.size, np.uint64) >> np.uint64(1)
        order = np.random.default_rng(entropy).permutation(self.size) if self.shuffle else np.arange(self.size)
        for index in order[self.rank :: self.num_replicas][: len(self)].tolist():
            yield Draw(index, int(seeds[index]))
