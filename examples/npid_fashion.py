"""NPID on Fashion-MNIST with a network and a loop of one's own: the loss, its memory, and the vote of neighbours.

Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination. CVPR 2018,
arXiv 1805.01978. `fastret train --data fashion --loss npid` does the same with checkpoints, a report and a plot.

    apt-get update && apt-get install dataset-fashion-mnist        # or FASTRET_DATA=FOLDER
    python examples/npid_fashion.py
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

import fastret
from fastret.data import ImageSet, load_fashion_mnist
from fastret.training.augment import PHOTOS
from fastret.training.heap import keep_freed_memory

DIM, BATCH = 128, 256


def network(channels: int) -> nn.Module:
    """Images from 0 to 255 to unit rows; any network will do."""
    layers: list[nn.Module] = [nn.BatchNorm2d(channels)]
    for width in (16, 32, 64):
        layers += [nn.LazyConv2d(width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(DIM, bias=False), nn.BatchNorm1d(DIM, affine=False))


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([normalize(model(part.float())) for part in images.split(1024)])


def accuracy(model: nn.Module, memory: Tensor, train: ImageSet, test: ImageSet) -> float:
    """Of the vote: the memory's rows are the gallery, so that only the test images are embedded."""
    classes, _ = fastret.retrieval.knn_classify(embed(model.eval(), test.images), memory, train.labels)
    model.train()
    return (classes[:, 0] == test.labels).float().mean().item()


def run(train: ImageSet, test: ImageSet, epochs: int, num_noise: int = 4096) -> list[float]:
    """Accuracy untrained and after every epoch."""
    torch.manual_seed(0)
    views = torch.Generator().manual_seed(0)
    model, criterion = network(train.images.shape[1]), fastret.NPID(len(train.images), DIM, num_noise=num_noise)
    embed(model, train.images)  # gives BatchNorms their statistics
    # From random rows the first epochs would learn little: each image starts where the network puts it.
    criterion.bank.memory.copy_(embed(model.eval(), train.images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    found = [accuracy(model, criterion.bank.memory, train, test)]
    print(f"untrained: kNN top-1 {found[0]:.1%}")
    for epoch in range(1, epochs + 1):
        for index in tqdm(torch.randperm(len(train.images)).split(BATCH), f"epoch {epoch}", unit="batch", leave=False):
            loss = criterion(normalize(model(PHOTOS(train.images[index], views))), index)
            loss.backward()  # also moves the memory's rows of these images
            optimizer.step()
            optimizer.zero_grad()
        found.append(accuracy(model, criterion.bank.memory, train, test))
        print(f"epoch {epoch}: loss {loss.item():.3f}, kNN top-1 {found[-1]:.1%}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="NPID on Fashion-MNIST, without labels.")
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    run(*load_fashion_mnist(), parser.parse_args(argv).epochs)


if __name__ == "__main__":
    keep_freed_memory()
    main()
