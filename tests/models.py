"""A model that tests share."""
import torch

import model as nano


def random_model(seed=0, **shape):
    """Random, with norms that are not all one."""
    torch.manual_seed(seed)
    m = nano.Transformer(nano.Config(**shape))
    for p in m.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return m
