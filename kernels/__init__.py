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
    products      how the matrix products are made: feature-major, or row-major on weights packed by oneDNN
    torch_flow    from feature maps to log-likelihoods: layout, positional tables, chunks of rows
    anomaly_map   the tail: exp, upsample, sum over scales
A module here knows tensors, shapes and strides; nothing of encoders, modules or files.
"""
