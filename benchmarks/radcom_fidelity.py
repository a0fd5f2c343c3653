"""How near the generated RadCom snapshots are to recorded ones: power at each SNR, and transfer of a classifier.

    python benchmarks/radcom_fidelity.py --path RadComDynamic.hdf5

A classifier of modulation and of signal type, trained on generated snapshots and tested on recorded ones that no classifier has
seen, is held against one trained on as many recorded snapshots and tested on the same ones. The held-out ones are a contiguous fifth
of the numbers of every pair at every SNR, another fifth for each seed: neighbours may share one draw of the fading, so a
random part would leak into the training part.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgradnorm.errors import FedGradNormError
from fedgradnorm.federations.radcom import read_hdf5
from fedgradnorm.federations.radcom_channel import MODULATIONS, PAIRS, SIGNALS, snapshots
from fedgradnorm.randomness import generator, seeded

BANDS = {
    "all SNRs": (-200, 200),
    "0 dB and above": (0, 200),
    "-10 to -2 dB": (-10, -1),
    "below -10 dB": (-200, -11),
}
CLASS_OF_PAIR = torch.tensor(
    [[MODULATIONS.index(modulation), SIGNALS.index(signal)] for modulation, signal in PAIRS]
)
FOLDS = 5
NEIGHBOURS = 5


def recorded(path: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The file as an array of shape (pairs, SNRs, numbers, 256), and its SNRs; the first ``limit`` numbers of each."""
    file = read_hdf5(path)
    snrs = np.unique(file.snr)
    pairs = np.array([PAIRS.index(pair) for pair in zip(file.modulation, file.signal, strict=True)])
    cells = [
        [file.data[(pairs == pair) & (file.snr == snr)][:limit] for snr in snrs]
        for pair in range(len(PAIRS))
    ]
    count = min(len(cell) for row in cells for cell in row)
    if count < FOLDS:
        raise FedGradNormError(
            f"{path}: {count} snapshots of a pair at an SNR, expected at least {FOLDS} at every SNR of the file"
        )
    return np.stack([np.stack([cell[:count] for cell in row]) for row in cells]), snrs


def generated(snrs: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Generated snapshots, shape (pairs, SNRs, count, 256)."""
    cells = [
        [
            snapshots(*pair, int(snr), count, generator(seed, 0, "", f"fidelity {pair} {snr}"))
            for snr in snrs
        ]
        for pair in PAIRS
    ]
    return np.stack([np.stack(row) for row in cells])


def decibels(values: np.ndarray, axis: tuple[int, ...] | int) -> np.ndarray:
    """Mean power in dB: a snapshot's 256 numbers make 128 complex samples."""
    power: np.ndarray = 10 * np.log10(
        2 * np.square(values, dtype=np.float64).mean(axis=-1).mean(axis=axis)
    )
    return power


def standard_error(cells: np.ndarray) -> float:
    """Of the mean power of snapshots of shape (pairs, numbers, 256), in dB: neighbours, which may share their fading, count as one."""
    blocks = np.array_split(
        2 * np.square(cells, dtype=np.float64).mean(axis=-1),
        max(cells.shape[1] // NEIGHBOURS, 1),
        axis=1,
    )
    powers = np.stack([block.mean(axis=1) for block in blocks])
    return float(10 / np.log(10) * powers.std(ddof=1) / np.sqrt(powers.size) / powers.mean())


def power_report(theirs: np.ndarray, ours: np.ndarray, snrs: np.ndarray) -> list[str]:
    """Tables of the mean power at each SNR, and of each pair over the SNRs from 0 dB, where the signal is most of the power."""
    lines = ["## Mean power", ""]
    lines += [
        "| SNR (dB) | generated (dB) | recorded ± standard error (dB) | difference (dB) | largest difference of a pair (dB) |",
        "|---|---|---|---|---|",
    ]
    for index, snr in enumerate(snrs):
        our_power, their_power = (
            decibels(ours[:, index], (0, 1)),
            decibels(theirs[:, index], (0, 1)),
        )
        by_pair = decibels(ours[:, index], 1) - decibels(theirs[:, index], 1)
        worst = int(np.abs(by_pair).argmax())
        recorded_power = f"{their_power:.2f} ± {standard_error(theirs[:, index]):.2f}"
        largest = f"{by_pair[worst]:+.2f} ({' / '.join(PAIRS[worst])})"
        lines.append(
            f"| {snr} | {our_power:.2f} | {recorded_power} | {our_power - their_power:+.2f} | {largest} |"
        )
    high = snrs >= 0
    lines += [
        "",
        "| pair, SNRs from 0 dB | generated (dB) | recorded (dB) | difference (dB) |",
        "|---|---|---|---|",
    ]
    for pair, our_power, their_power in zip(
        PAIRS, decibels(ours[:, high], (1, 2)), decibels(theirs[:, high], (1, 2)), strict=True
    ):
        lines.append(
            f"| {' / '.join(pair)} | {our_power:.2f} | {their_power:.2f} | {our_power - their_power:+.2f} |"
        )
    return lines


class Classifier(nn.Module):
    """A small convolutional network with one output for the modulations and one for the signals, blind to the power."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((2, 32), (32, 48), (48, 64)):
            layers += [
                nn.Conv1d(inputs, outputs, kernel_size=7, padding=3),
                nn.BatchNorm1d(outputs),
                nn.ReLU(),
                nn.MaxPool1d(2),
            ]
        self.trunk = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(64 * 16, 96), nn.ReLU(), nn.Dropout(0.3)
        )
        self.modulation = nn.Linear(96, len(MODULATIONS))
        self.signal = nn.Linear(96, len(SIGNALS))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of shape (n, 256) to outputs of shapes (n, 6) and (n, 8)."""
        waves = inputs.view(-1, 2, 128)
        features = self.trunk(waves / waves.square().mean(dim=(1, 2), keepdim=True).sqrt())
        return self.modulation(features), self.signal(features)


def flat(values: np.ndarray, snrs: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
    """Snapshots of shape (pairs, SNRs, count, 256) as inputs (n, 256), classes (n, 2) and SNRs (n,)."""
    pairs, _, count, size = values.shape
    classes = CLASS_OF_PAIR.repeat_interleave(len(snrs) * count, dim=0)
    return (
        torch.from_numpy(values.reshape(-1, size)),
        classes,
        np.tile(np.repeat(snrs, count), pairs),
    )


def trained(inputs: Tensor, classes: Tensor, epochs: int, seed: int) -> Classifier:
    """A classifier after so many epochs of Adam with a one-cycle learning rate."""
    with seeded(seed, 0, "", "fidelity"):
        model, batch = Classifier(), 128
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
        steps = epochs * (len(inputs) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        for _ in range(epochs):
            for index in torch.randperm(len(inputs))[: len(inputs) // batch * batch].view(
                -1, batch
            ):
                optimizer.zero_grad()
                modulation, signal = model(inputs[index])
                loss = functional.cross_entropy(
                    modulation, classes[index, 0]
                ) + functional.cross_entropy(signal, classes[index, 1])
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def correct(model: Classifier, inputs: Tensor, classes: Tensor) -> np.ndarray:
    """Whether the modulation, and the signal, of each snapshot is found: shape (n, 2)."""
    found = torch.stack([outputs.argmax(dim=1) for outputs in model(inputs)], dim=1)
    return (found == classes).numpy()


def transfer(
    theirs: np.ndarray, snrs: np.ndarray, epochs: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Accuracies, (modulation, signal), by row of the report and by what the classifier was trained on."""
    count = theirs.shape[2]
    held_out = np.array_split(np.arange(count), FOLDS)[seed % FOLDS]
    kept = np.delete(theirs, held_out, axis=2)
    inputs, classes, test_snrs = flat(theirs[:, :, held_out], snrs)
    pair_of_test = np.repeat(np.arange(len(PAIRS)), len(snrs) * len(held_out))
    rows = {name: (test_snrs >= low) & (test_snrs <= high) for name, (low, high) in BANDS.items()}
    rows |= {
        f"{' / '.join(pair)}, from 0 dB": (pair_of_test == index) & (test_snrs >= 0)
        for index, pair in enumerate(PAIRS)
    }
    results: dict[str, dict[str, np.ndarray]] = {
        name: {} for name, chosen in rows.items() if chosen.any()
    }
    for source, values in (("generated", generated(snrs, kept.shape[2], seed)), ("recorded", kept)):
        hits = correct(trained(*flat(values, snrs)[:2], epochs, seed), inputs, classes)
        for name in results:
            results[name][source] = hits[rows[name]].mean(axis=0)
    return results


def percent(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    return f"{100 * values.mean():{sign}.1f} ± {100 * values.std(ddof=1):.1f}"


def transfer_report(results: Sequence[dict[str, dict[str, np.ndarray]]]) -> list[str]:
    """A table of percentages, mean and standard deviation over the seeds; the gap is paired by seed."""
    lines = [
        f"## Accuracy on held-out recorded snapshots (%, mean ± standard deviation over {len(results)} seeds)",
        "",
    ]
    lines += [
        "| test snapshots | task | trained on generated | trained on recorded | gap |",
        "|---|---|---|---|---|",
    ]
    for name in results[0]:
        for index, task in enumerate(("modulation", "signal")):
            ours = np.array([result[name]["generated"][index] for result in results])
            theirs = np.array([result[name]["recorded"][index] for result in results])
            lines.append(
                f"| {name} | {task} | {percent(ours)} | {percent(theirs)} | {percent(ours - theirs, '+')} |"
            )
    return lines


def main() -> None:
    """Print both reports as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", required=True, help="an HDF5 file in the format of RadComDynamic")
    parser.add_argument("--seeds", type=int, default=3, help="how many; at least 2")
    parser.add_argument(
        "--limit",
        type=int,
        default=50,
        help="how many snapshots of each pair at each SNR to take from the file",
    )
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: expected at least 2, for a spread")
    torch.set_num_threads(1)
    try:
        theirs, snrs = recorded(options.path, options.limit)
    except FedGradNormError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n".join(power_report(theirs, generated(snrs, 400, seed=0), snrs)) + "\n\n")
    results = [transfer(theirs, snrs, options.epochs, seed) for seed in range(options.seeds)]
    sys.stdout.write("\n".join(transfer_report(results)) + "\n")


if __name__ == "__main__":
    main()
