"""The benchmark: who is faster, by how much, and where the time goes. `cflow-fast bench` is its command line.

Where to look:
    measurement.py   clocks, turns taken round by round, medians and ratios with their 95% intervals, memory
    cases.py         what is worked on: the decoders of an encoder at an image size and batch
    contenders.py    what a contender is; peers.py: FrEIA's modules, and how cflow-ad and anomalib call them
    yardstick.py     float64, and what a contender may deviate from it
    session.py       a run over all cases; runner.py: one case, all its contenders
    decoder.py, maps.py, end_to_end.py, training.py    the benchmarks: cases and contenders of each, one entry a line
    stages.py, scaling.py    where the time of `predict` goes; how time grows along every axis
    results.py       the stored form; machine.py: what it was measured on; report/: a page of them
    complexity.py, accuracy.py, ablation.py    the paper's tables; baselines/: PaDiM and SPADE; paper.py: its figures
    gpu.py           `make gpu`, a suite.py of steps; planned.py: what they launch, compiled ahead by warm.py
    roofline.py, kernel_times.py    what a card can do, and what every kernel reaches of it
    aot.py           kernels compiled for cards that are not here; prediction.py: what to expect of them
    tune.py          tile shapes, by measurement (tune_card.py) or by prediction (tune_predicted.py)
A new kernel, precision or peer is one more entry in a benchmark's CONTENDERS.
"""
