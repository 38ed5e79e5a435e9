"""Records what a training step compiles, and asks the report a few questions."""

import torch

import memplan
from examples.small_transformer import make

model, inputs = make()
step = torch.compile(model, backend="memplan")
with memplan.record() as recording:
    step(*inputs).backward()

found = memplan.report(recording)  # print(found) prints the summary; in a notebook it shows itself
found.save("recorded.html")  # also .json, .png and .md

graph = found.report.step
print(f"peak {graph.peak:,} bytes at step {graph.peak_step} of {len(graph.steps)}")
for storage in graph.alive_at(graph.peak_step)[:3]:
    buffer = graph.shown_at(storage, graph.peak_step)
    print(f"{storage.nbytes:>9,}  {buffer.kind:<9}  {buffer.origin.line:>3}: {buffer.origin.code.strip()}")
