"""What is done to a batch on the device: the fast way equals the naive one, and each sample has its own chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gradsync.datamodules.batches import (
    TrainingBatch,
    collate_evaluation,
    collate_training,
    mirrored,
    normalized,
    normalized_naively,
)

N, SIZE, CLASSES = 6, 8, 5


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return batch.contiguous(memory_format=torch.channels_last)


def labels() -> Tensor:
    return torch.arange(N) % CLASSES


SEEDS = np.array([3, 8, 5, 4, 12, 7])


def test_normalized() -> None:
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    for batch in (every_level, images(), images().contiguous()):
        ours = normalized(batch)
        assert ours.dtype == torch.float32
        assert ours.is_contiguous(memory_format=torch.channels_last)
        # The same three operations, rounded in another order; values reach 2.7.
        assert torch.allclose(ours, normalized_naively(batch), rtol=0, atol=1e-6)


def test_mirrored() -> None:
    which = SEEDS % 2 == 1
    turned = mirrored(images(), which)
    for number in range(N):
        original = images()[number]
        assert torch.equal(turned[number], original.flip(-1) if which[number] else original)


def test_half_of_the_images_are_mirrored() -> None:
    plain, turned = images()[:1], images()[:1].flip(-1)
    finish = TrainingBatch()
    count = 0
    for seed in np.random.SeedSequence(0).generate_state(1000).astype(np.int64):
        ours, _ = finish(plain.clone(), labels()[:1], np.array([seed]), CLASSES)
        assert torch.equal(ours, normalized(plain)) or torch.equal(ours, normalized(turned))
        count += torch.equal(ours, normalized(turned))
    assert abs(count - 500) < 5 * (1000 * 0.25) ** 0.5


def test_a_samples_fate_depends_on_its_own_seed_only() -> None:
    finish = TrainingBatch(erasing=0.5)
    whole, _ = finish(images(), labels(), SEEDS, CLASSES)
    state = torch.random.get_rng_state()
    for number in range(N):
        one, _ = finish(
            images()[number : number + 1], labels()[number : number + 1], SEEDS[number : number + 1], CLASSES
        )
        assert torch.equal(one[0], whole[number])
    assert torch.equal(state, torch.random.get_rng_state())


def test_erasing_sets_rectangles_to_the_mean() -> None:
    untouched, _ = TrainingBatch()(images(), labels(), SEEDS, CLASSES)
    erased, _ = TrainingBatch(erasing=1.0)(images(), labels(), SEEDS, CLASSES)
    changed = (untouched != erased).any(1)
    assert (erased.permute(0, 2, 3, 1)[changed] == 0).all()
    for mask in changed:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum() > 0


def mixed(mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    seeds = SEEDS.copy()
    seeds[0] = seed
    return TrainingBatch(mixup, cutmix)(images(), labels(), seeds, CLASSES)


def test_mixup_mixes_images_as_labels() -> None:
    plain, _ = TrainingBatch()(images(), labels(), SEEDS, CLASSES)
    ours, targets = mixed(0.4, 0, 3)
    assert targets.shape == (N, CLASSES)
    assert torch.allclose(targets.sum(1), torch.ones(N))
    share = targets[1, 1]  # of its own; the rest is of the image before
    assert 0 < share < 1
    assert torch.allclose(ours[1], share * plain[1] + (1 - share) * plain[0], atol=1e-5)


def test_cutmix_cuts_as_much_as_labels_say() -> None:
    plain, _ = TrainingBatch()(images(), labels(), SEEDS, CLASSES)
    ours, targets = mixed(0, 1.0, 3)
    kept = (ours[1] == plain[1]).all(0)
    assert 0 < kept.sum() < SIZE * SIZE
    assert targets[1, 1].item() == pytest.approx(kept.float().mean().item())
    assert torch.equal(ours[1].permute(1, 2, 0)[~kept], plain[0].permute(1, 2, 0)[~kept])


def test_both_are_drawn_by_the_seed_of_the_batch() -> None:
    first = [mixed(0.4, 1.0, seed)[0] for seed in range(1, 21, 2)]
    again = [mixed(0.4, 1.0, seed)[0] for seed in range(1, 21, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    plain, _ = TrainingBatch()(images(), labels(), SEEDS, CLASSES)
    kinds = [(batch == plain).all(1).any() for batch in first]  # CutMix leaves whole pixels as they are
    assert any(kinds)
    assert not all(kinds)


def test_collating() -> None:
    samples = [(image, int(label), int(seed)) for image, label, seed in zip(images(), labels(), SEEDS, strict=True)]
    batch, targets, seeds = collate_training(samples)
    assert torch.equal(batch, images())
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(targets, labels())
    assert seeds.tolist() == SEEDS.tolist()
    some = collate_evaluation([(images()[0], 1), None, (images()[2], 0)])
    assert some is not None
    assert torch.equal(some[0], images()[[0, 2]])
    assert some[1].tolist() == [1, 0]
    assert collate_evaluation([None, None]) is None
