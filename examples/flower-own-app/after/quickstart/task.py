"""The model, the data and the training."""

import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

TASKS = {
    "odd": lambda digit: digit % 2 == 1,
    "large": lambda digit: digit >= 5,
    "round": lambda digit: (digit == 0) | (digit == 6) | (digit == 8) | (digit == 9),
}
"""What each client wants to know about a digit."""


class Net(nn.Module):
    """A small CNN."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 2)

    def forward(self, x):
        """The scores of no and yes."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


def load_data(partition_id: int, num_partitions: int):
    """A client's own images, with the labels of its own task."""
    digits = load_digits()
    images = torch.tensor(
        digits.images[partition_id::num_partitions] / 16, dtype=torch.float32
    ).unsqueeze(1)
    digit = torch.tensor(digits.target[partition_id::num_partitions])
    labels = list(TASKS.values())[partition_id % len(TASKS)](digit).long()
    train, test = random_split(
        TensorDataset(images, labels), [0.8, 0.2], torch.Generator().manual_seed(42)
    )
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=32)


def train(net, trainloader, epochs, lr):
    """Train the model. Gives the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


def test(net, testloader):
    """Test the model. Gives the mean loss and the accuracy."""
    correct, loss = 0, 0.0
    net.eval()
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images)
            loss += F.cross_entropy(outputs, labels, reduction="sum").item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(testloader.dataset), correct / len(testloader.dataset)
