"""Exports and saves a model: ``memplan report small.memplan`` reads the report in it."""

import torch

import memplan
from examples.small_transformer import Model

model = Model().eval().requires_grad_(False)
exported = torch.export.export(model, (torch.randn(8, 128, 128),))
memplan.save(exported, "small.memplan")
