"""A loop as tutorials of PyTorch write it: a DataLoader over tensors, and the teacher under `no_grad` in each step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peers.pairs import ALPHA, RATE, TEMPERATURE, Data, Nets, Tick


def train(nets: Nets, data: Data, tick: Tick) -> None:
    teacher, student = nets
    loader = data.loader()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    while True:
        running_loss, correct = 0.0, 0
        for inputs, labels in loader:
            optimizer.zero_grad()
            with torch.no_grad():
                targets = F.softmax(teacher(inputs) / TEMPERATURE, dim=1)
            logits = student(inputs)
            soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), targets, reduction="batchmean")
            loss = (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * soft
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
            tick()
