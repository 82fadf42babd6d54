"""What a spawned process runs. It imports this file, so nothing else stands here."""

import torch


def answer(model, queue):
    queue.put(model(torch.arange(2, 7)[None]).logits.detach().numpy())
