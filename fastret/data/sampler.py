"""Batches with the same number of samples of each of several classes (P x K sampling).

The layout is the one Smooth-AP's official call expects (Brown et al., "Smooth-AP: Smoothing the Path Towards
Large-Scale Image Retrieval", ECCV 2020): consecutive blocks of K rows of one class. P x K sampling itself is
from Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


class ClassBalancedBatches(Iterator[torch.Tensor]):
    """An endless iterator of index batches (classes_per_batch * samples_per_class,) int64.

    Rows k * samples_per_class ... (k + 1) * samples_per_class - 1 of a batch are samples of its k-th class; a
    batch never holds a class twice. Classes are drawn without replacement until all have been used, then
    anew: where they run out in the middle of a batch it is filled from the next shuffle, so all classes are
    used equally often. The samples of a class are distinct unless it has fewer than `samples_per_class`; then
    each is used once before any is repeated.

    Memory O(n). A batch costs O(classes + samples of the classes drawn).

    Args:
        labels: (n,) of any integer dtype and any values, on the CPU.
        classes_per_batch: P, at most the number of classes.
        samples_per_class: K.
        generator: a CPU generator, the only source of randomness; its state is part of `state_dict`.

    Raises:
        ValueError: labels are not a non-empty integer vector, or P or K is out of range.
    """

    def __init__(
        self,
        labels: torch.Tensor,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        generator: torch.Generator,
    ) -> None:
        if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels must be a non-empty integer vector, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        _, counts = torch.unique(labels, return_counts=True)
        if not 1 <= classes_per_batch <= len(counts):
            raise ValueError(
                f"classes_per_batch must lie in [1, {len(counts)}], the number of classes, got {classes_per_batch}"
            )
        if samples_per_class < 1:
            raise ValueError(f"samples_per_class must be at least 1, got {samples_per_class}")
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.generator = generator
        self._members = torch.split(labels.argsort(stable=True), counts.tolist())
        self._deck = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> torch.Tensor:
        return torch.cat([self._draw_samples(self._members[c]) for c in self._draw_classes().tolist()])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `load_state_dict` needs to go on with the very next batch; tensors only, so safe to load."""
        return {"deck": self._deck.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on where the sampler that gave `state` stood; it must have had the same labels.

        Raises:
            ValueError: `state` lacks an entry or names classes that these labels do not have.
        """
        if state.keys() != {"deck", "generator"}:
            raise ValueError(f"state must have the keys deck and generator, got {sorted(state)}")
        deck = state["deck"]
        classes = len(self._members)
        if len(deck) and not 0 <= int(deck.min()) <= int(deck.max()) < classes:
            raise ValueError(
                f"state is of other labels: its classes are in [{int(deck.min())}, {int(deck.max())}], "
                f"here they are in [0, {classes - 1}]"
            )
        self._deck = deck.clone()
        self.generator.set_state(state["generator"])

    def _draw_classes(self) -> torch.Tensor:
        """The next P distinct classes of the deck, (P,) positions in `_members`."""
        drawn = self._deck[: self.classes_per_batch]
        rest = self._deck[self.classes_per_batch :]
        missing = self.classes_per_batch - len(drawn)
        if missing:
            fresh = torch.randperm(len(self._members), generator=self.generator)
            # Classes already in this batch wait for the next one: they lose no turn and do not appear twice.
            repeated = torch.isin(fresh, drawn)
            others = fresh[~repeated]
            drawn = torch.cat([drawn, others[:missing]])
            rest = torch.cat([fresh[repeated], others[missing:]])
        self._deck = rest
        return drawn

    def _draw_samples(self, members: torch.Tensor) -> torch.Tensor:
        """K of a class's sample indices, (K,): distinct, or in rounds where the class has fewer than K."""
        order = torch.randperm(len(members), generator=self.generator)
        rounds = -(-self.samples_per_class // len(members))
        return members[order.repeat(rounds)[: self.samples_per_class]]
