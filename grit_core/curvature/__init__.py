"""Curvature in rank space: what GRIT knows of the loss around an adapter.

A layer computes y = W x + s B A x with A of shape [R, I], B of shape [O, R] and s = alpha / R. In
the R-dimensional space between A and B live two vectors for every token:

    z = A x             what the adapter reads           [R]
    h = dl/dz = s B'g   what the loss l wants there       [R], with g = dl/dy

and two small matrices say all that K-FAC (Martens & Grosse 2015) needs of them:

    Z = E[z z']         the factor that preconditions B   [R, R]
    H = E[h h']         the factor that preconditions A   [R, R]

The Fisher blocks are F_B = Z (x) G and F_A = X (x) H; keeping their rank-space halves gives the
natural directions dB Z^-1 and H^-1 dA, which do not depend on how BA is split into B and A.

Both come from one tensor, the output z of PEFT's `lora_A` module: a forward hook sees z, a hook on
z sees dL/dz. No activation of the layer's width is kept.

    factors.py       running factors, eigenbases, spectrum, effective rank: functions of tensors
    capture.py       the hooks that fill them
    rank_group.py    layers of equal rank together: factors, bases, what they tell
    ../optimizer.py  what a step makes of them

Shape suffixes: T token positions, R rank, L layers of equal rank, I layer inputs, O layer outputs.
"""
