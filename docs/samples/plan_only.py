"""Plans a step without running it, with two sets of options."""

import memplan
from examples.small_transformer import make

model, inputs = make(batch=32)
for options in ({}, {"budget": "64MiB"}):
    graphs = memplan.analyze(model, inputs, options=options)
    print(options, f"{memplan.report(graphs).report.step.peak / 2**20:.1f} MiB")
