"""Half-steps and output at any length, in memory O(Q + K): each half-step is a pass that writes a vector."""

import triton
import triton.language as tl

from sinkformer_pl.ops.sinkhorn_attention.gpu.tiles import (
    ANY,
    LOG2E,
    NONE,
    add_product,
    column_step,
    load_columns,
    load_rows,
    log_marginal,
    real_tokens,
    scores,
    store_rows,
)


@triton.jit
def half_step(
    A, B, BIAS, LA, LB, SCALE, LAM, FB, FA_BEFORE, FA, NU,
    sab, sah, san, sbb, sbh, sbn, sib, sih, sia, sij, slab, slah, slbb, slbh, ssb, ssh, slb, slh,
    scale, uniform, heads, nA, nB, blocks,
    D: tl.constexpr, DB: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
    FREE: tl.constexpr, MAXIMUM: tl.constexpr, COLUMN: tl.constexpr, DAMPED: tl.constexpr,
):  # fmt: skip
    """The potential FA of the tokens A from that of the tokens B: a row step, or with A the keys a column step.

    FREE: the potential FB is 0. Without MAXIMUM the shift of a sum is the potential FA_BEFORE of the step before.
    """
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    ia = (pid % blocks) * BA + tl.arange(0, BA)
    d = tl.arange(0, DB)
    if BIAS is not None:
        BIAS += b * sib + h * sih
    if LA is not None:
        LA += b * slab + h * slah
        LB += b * slbb + h * slbh
    scale = scale * LOG2E
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32) * LOG2E
    la = log_marginal(LA, ia, nA, uniform)
    a = load_rows(A + b * sab + h * sah, san, ia, la > ANY, d, D, DB)
    B += b * sbb + h * sbh
    total = tl.zeros([BA], tl.float32)
    if MAXIMUM:
        shift = tl.full([BA], NONE, tl.float32)
    else:
        before = tl.load(FA_BEFORE + n * nA + ia, mask=ia < nA, other=NONE)
        shift = tl.where(before > ANY, -before, -NONE)
    for start in range(0, nB, BB):
        ib = start + tl.arange(0, BB)
        if FREE:
            potential = tl.where(log_marginal(LB, ib, nB, 0.0) > ANY, 0.0, NONE)
        else:
            potential = tl.load(FB + n * nB + ib, mask=ib < nB, other=NONE)
        bt = load_columns(B, sbn, ib, real_tokens(potential, ib, nB, LB is not None), d, D, DB)
        s = scores(a, bt, scale, BIAS, sia, sij, ia, ib, nA, nB, PRECISION) + potential[None, :]
        if MAXIMUM:
            higher = tl.maximum(shift, tl.max(s, 1))
            total = total * tl.exp2(shift - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
            shift = higher
        else:
            total += tl.sum(tl.exp2(s - shift[:, None]), 1)
    lse = tl.where((tl.abs(shift) < -ANY) & (total > 0.0), shift + tl.log2(total), NONE)
    lam = 1.0
    if DAMPED and COLUMN:
        lam = tl.load(LAM + b * slb + h * slh).to(tl.float32)
    if COLUMN:
        tl.store(NU + n * nA + ia, tl.where((la > ANY) & (lse > ANY), -lse, NONE), mask=ia < nA)
    tl.store(FA + n * nA + ia, column_step(lse, la, lam, DAMPED and COLUMN), mask=ia < nA)


@triton.jit
def forward(
    Q, K, V, BIAS, LR, LC, SCALE, O, F_BEFORE, F, G,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbq, sbk, slrb, slrh, slcb, slch, ssb, ssh,
    scale, heads, nQ, nK, blocks,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, FREE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The output, and with it the last row step, F; with EVEN, F is given and no row step left. FREE: G is 0."""
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    iq = (pid % blocks) * BQ + tl.arange(0, BQ)
    d, dv = tl.arange(0, DB), tl.arange(0, DVB)
    K += b * skb + h * skh
    V += b * svb + h * svh
    if BIAS is not None:
        BIAS += b * sbb + h * sbh
    if LR is not None:
        LR += b * slrb + h * slrh
        LC += b * slcb + h * slch
    scale = scale * LOG2E
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32) * LOG2E
    lr = log_marginal(LR, iq, nQ, 0.0)
    q = load_rows(Q + b * sqb + h * sqh, sqn, iq, lr > ANY, d, D, DB)
    o = tl.zeros([BQ, DVB], tl.float32)
    total = tl.zeros([BQ], tl.float32)
    shift = tl.full([BQ], NONE, tl.float32)
    if EVEN:
        f = tl.load(F_BEFORE + n * nQ + iq, mask=iq < nQ, other=NONE)
    for start in range(0, nK, BK):
        ik = start + tl.arange(0, BK)
        if FREE:
            g = tl.where(log_marginal(LC, ik, nK, 0.0) > ANY, 0.0, NONE)
        else:
            g = tl.load(G + n * nK + ik, mask=ik < nK, other=NONE)
        real = real_tokens(g, ik, nK, LC is not None)
        kt = load_columns(K, skn, ik, real, d, D, DB)
        v = load_rows(V, svn, ik, real, dv, DV, DVB)
        s = scores(q, kt, scale, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION) + g[None, :]
        if EVEN:
            p = tl.exp2(s + f[:, None])
        else:
            higher = tl.maximum(shift, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            fade = tl.exp2(shift - higher)
            total = total * fade + tl.sum(p, 1)
            o = o * fade[:, None]
            shift = higher
        o = add_product(p.to(v.dtype), v, o, PRECISION)
    if not EVEN:
        there = (lr > ANY) & (shift > ANY)
        o = o * tl.where(there, tl.exp2(lr) / total, 0.0)[:, None]
        tl.store(F + n * nQ + iq, tl.where(there, lr - shift - tl.log2(total), NONE), mask=iq < nQ)
    store_rows(O + b * sob + h * soh, son, iq, iq < nQ, dv, o, DV, DVB)


@triton.jit
def gather(
    A, B, BIAS, FB, X, sab, sah, san, sbb, sbh, sbn, sib, sih, sia, sij, scale, fa, n, b, h, ia, nA, nB,
    D: tl.constexpr, DB: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """sum_b 2^(s + fa + FB_b) X_b for tokens a; X None: the sums."""
    d = tl.arange(0, DB)
    if BIAS is not None:
        BIAS += b * sib + h * sih
    a = load_rows(A + b * sab + h * sah, san, ia, fa > ANY, d, D, DB)
    B += b * sbb + h * sbh
    y = tl.zeros([BA], tl.float32)
    for start in range(0, nB, BB):
        ib = start + tl.arange(0, BB)
        fb = tl.load(FB + n * nB + ib, mask=ib < nB, other=NONE)
        bt = load_columns(B, sbn, ib, real_tokens(fb, ib, nB, MASKED), d, D, DB)
        s = scores(a, bt, scale, BIAS, sia, sij, ia, ib, nA, nB, PRECISION)
        p = tl.exp2(s + fa[:, None] + fb[None, :])
        if X is not None:
            p = p * tl.load(X + n * nB + ib, mask=ib < nB, other=0.0)[None, :]
        y += tl.sum(p, 1)
    return y


@triton.jit
def matvec(
    A, B, BIAS, SCALE, FA, FB, X, Y,
    sab, sah, san, sbb, sbh, sbn, sib, sih, sia, sij, ssb, ssh, scale, heads, nA, nB, blocks,
    D: tl.constexpr, DB: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Y_a = sum_b 2^(s + FA_a + FB_b) X_b; with A the keys the product with the transpose. X None: the sums."""
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    ia = (pid % blocks) * BA + tl.arange(0, BA)
    scale = scale * LOG2E
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32) * LOG2E
    fa = tl.load(FA + n * nA + ia, mask=ia < nA, other=NONE)
    y = gather(
        A, B, BIAS, FB, X, sab, sah, san, sbb, sbh, sbn, sib, sih, sia, sij, scale, fa, n, b, h, ia, nA, nB,
        D, DB, BA, BB, PRECISION, MASKED,
    )  # fmt: skip
    tl.store(Y + n * nA + ia, y, mask=ia < nA)
