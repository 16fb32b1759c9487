"""PatchMix on Fashion-MNIST with a network and a loop of one's own: mixed images, the step's contrasts, a key network.

Shen, Liu, Tang, Qu, Wang: Inter-Instance Similarity Modeling for Contrastive Learning. arXiv 2306.12243.
`fastret train --data fashion --loss patchmix` trains a vision transformer, with checkpoints, a report and a plot.

    apt-get update && apt-get install dataset-fashion-mnist        # or FASTRET_DATA=FOLDER
    python examples/patchmix_fashion.py
"""

import argparse
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

import fastret
from fastret.data import ImageSet, load_fashion_mnist
from fastret.functional import patchmix
from fastret.training.augment import PHOTOS
from fastret.training.heap import keep_freed_memory

DIM, BATCH, PATCH, MIX = 128, 512, 4, 2
MOMENTUM = 0.95  # of the key network


def network(channels: int) -> nn.Module:
    """Images from 0 to 255 to features; any network will do."""
    layers: list[nn.Module] = [nn.BatchNorm2d(channels)]
    for width in (16, 32, 64):
        layers += [nn.LazyConv2d(width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(DIM, bias=False), nn.BatchNorm1d(DIM, affine=False))


def accuracy(model: nn.Module, train: ImageSet, test: ImageSet) -> float:
    """Of the weighted vote of the 200 nearest training images."""

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        return torch.cat([normalize(model(part.float())) for part in images.split(1024)])

    model.eval()
    classes, _ = fastret.retrieval.knn_classify(embed(test.images), embed(train.images), train.labels)
    model.train()
    return (classes[:, 0] == test.labels).float().mean().item()


def run(train: ImageSet, test: ImageSet, epochs: int) -> list[float]:
    """Accuracy untrained and after every epoch."""
    torch.manual_seed(0)
    views = torch.Generator().manual_seed(0)
    online = network(train.images.shape[1])
    online(train.images[:1024].float())  # makes the lazy layers
    key = deepcopy(online).requires_grad_(False)
    predictor = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.ReLU(), nn.Linear(DIM, DIM))
    criterion = fastret.PatchMixLoss(MIX)
    optimizer = torch.optim.AdamW([*online.parameters(), *predictor.parameters()], lr=2e-3)
    found = [accuracy(online, train, test)]
    print(f"untrained: kNN top-1 {found[0]:.1%}")
    for epoch in range(1, epochs + 1):
        batches = torch.randperm(len(train.images)).split(BATCH)
        for index in tqdm(batches, f"epoch {epoch}", unit="batch", leave=False):
            x1, x2 = (PHOTOS(train.images[index], views) for _ in range(2))
            # one permutation of patches for each: images that are mixed alike are like each other
            mixed1, mixed2 = (patchmix(x, PATCH, MIX) for x in (x1, x2))
            with torch.no_grad():
                k1, k2, mixed_k1 = (key(x) for x in (x1, x2, mixed1))
            loss = criterion(predictor(online(x1)), k1, k2, predictor(online(mixed2)), mixed_k1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for slow, fast in zip(key.parameters(), online.parameters(), strict=True):
                    slow.lerp_(fast, 1 - MOMENTUM)
        found.append(accuracy(online, train, test))
        print(f"epoch {epoch}: loss {loss.item():.3f}, kNN top-1 {found[-1]:.1%}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="PatchMix on Fashion-MNIST, without labels.")
    parser.add_argument("--epochs", type=int, default=2, help="default: %(default)s")
    run(*load_fashion_mnist(), parser.parse_args(argv).epochs)


if __name__ == "__main__":
    keep_freed_memory()
    main()
