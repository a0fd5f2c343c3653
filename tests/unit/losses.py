"""Losses that compare every example with all others, which is meant."""

import torch
from torch.nn import functional


def cox(outputs, targets):
    """Cox's partial likelihood, of targets ``(time, event)``."""
    time, event = targets[:, 0], targets[:, 1]
    at_risk = time[None, :] >= time[:, None]
    hazards = torch.logsumexp(outputs[:, 0][None, :].masked_fill(~at_risk, -1e9), dim=1)
    return -((outputs[:, 0] - hazards) * event).sum() / event.sum().clamp_min(1)


def contrastive(outputs, targets):
    near = functional.normalize(outputs, dim=1)
    alike = targets[:, None] == targets[None, :]
    logits = (near @ near.t()) / 0.5
    return -(logits.log_softmax(dim=1) * alike).sum() / alike.sum()
