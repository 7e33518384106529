"""Kernels of the conditional flow and of the anomaly map.

How the work is cut. A folded decoder sends N = B H W feature vectors through K coupling blocks; per block there are

    A  hidden = act(w1 x1 + rows[r] + columns[q])      N x h      -> N x m     the condition is two small tables
    B  s, t   = w2 hidden + b2;  y2 = x2 exp(alpha tanh s) + t;  row sums      N x m -> N x d
    C  x'     = a permutation of [x1; y2]: indices, or matrix products with scale and offset folded in

and then one number per row, log p. Everything constant was folded away beforehand (`cflow_fast.folding`): the
condition is never concatenated, no permutation's inverse is kept, the last permutation only turns u and is skipped.

Where to read on:
    weights       what a folded decoder consists of, with shapes
    flow          the loop over the blocks in plain PyTorch: what everything else must agree with
    products, torch_flow      its products by PyTorch; from feature maps to log-likelihoods
    cpu/flow.h, cpu_flow      all of it in one call of compiled code on a CPU, epilogues inside the products
    cpu/map.h, cpu_map        the anomaly map there, every pixel written once; cpu_library: which variant a CPU runs
    triton_flow   the same calls on a GPU: a narrow decoder whole, a wide one in phases
    whole_flow    all blocks in one launch, the state in registers or beside them (_kernel, _halves, _mixing, _weights)
    phases        a few launches per block: linear (A, C), coupling (B); packing, state, rows and tiles are beside them
    merging       of few rows a soft permutation and the next first layer as one product
    scaling       operands of fp16 for these, in which every row has a scale of its own (bounds: known beforehand)
    anomaly_map, anomaly_tail exp, upsample, sum over scales, score: in PyTorch, in one launch
    pointwise     what the plain path fuses between its products on a GPU
    configs       every tile shape, and how one is chosen; lang: what kernels are written in; chip: the card
    operands      what a precision makes operands of, and how products take them
    tuning        tables before rules (tuning_table: as a file); tuned_flow: Triton or the plain path
    registration  the operations as PyTorch knows them; capture: streams and CUDA graphs; table_cache: tables by size
A module here knows tensors, shapes and strides; nothing of encoders, modules or files, but for the tables.
"""
