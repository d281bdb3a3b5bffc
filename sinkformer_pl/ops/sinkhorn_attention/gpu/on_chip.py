"""One program a head, its whole kernel matrix on chip: 21 half-steps cost little more than 3. For up to 128 x 128.

The form is that of `closed_form`: Z = 2^(s - m - c) with row maxima m and then column maxima c, and scalings
u = 2^(f + m) of the queries and w = 2^(g + c) of the keys. They stay in range for 22 half-steps.
"""

import triton
import triton.language as tl

from sinkformer_pl.ops.sinkhorn_attention.gpu.tiles import (
    ANY,
    LOG2E,
    NONE,
    load_columns,
    load_rows,
    log_marginal,
    product,
    scores,
    store_rows,
)


@triton.jit
def _inverse(sums):
    return tl.where(sums > 0.0, 1.0 / tl.where(sums > 0.0, sums, 1.0), 0.0)


@triton.jit
def forward(
    Q, K, V, BIAS, LR, LC, SCALE, LAM, O, U, W, NRM, M, C,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbq, sbk,
    slrb, slrh, slcb, slch, ssb, ssh, slb, slh,
    scale, uniform, heads, nQ, nK, N, PAIRS,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Half-steps and output of one head.

    U (row steps, N, Q), W (1 + PAIRS, N, K), NRM (PAIRS, N, K) with DAMPED, M (N, Q) and C (N, K) are filled.
    """
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    iq, ik, d, dv = tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, DB), tl.arange(0, DVB)
    if BIAS is not None:
        BIAS += b * sbb + h * sbh
    if LR is not None:
        LR += b * slrb + h * slrh
        LC += b * slcb + h * slch
    scale = scale * LOG2E
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32) * LOG2E
    lam = 1.0
    if DAMPED:
        lam = tl.load(LAM + b * slb + h * slh).to(tl.float32)
        NRM += n * nK
    steps_q, steps_k = (n * 0 + N) * nQ, (n * 0 + N) * nK
    U += n * nQ
    W += n * nK
    lr = log_marginal(LR, iq, nQ, 0.0)
    lc = log_marginal(LC, ik, nK, uniform)
    r = tl.exp2(lr)
    q = load_rows(Q + b * sqb + h * sqh, sqn, iq, lr > ANY, d, D, DB)
    kt = load_columns(K + b * skb + h * skh, skn, ik, lc > ANY, d, D, DB)
    s = scores(q, kt, scale, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
    s += tl.where(lr > ANY, 0.0, NONE)[:, None] + tl.where(lc > ANY, 0.0, NONE)[None, :]
    m = tl.max(s, 1)
    m = tl.where(m > ANY, m, 0.0)
    s -= m[:, None]
    c = tl.max(s, 0)
    there = c > ANY
    c = tl.where(there, c, 0.0)
    z = tl.exp2(s - c[None, :])
    tl.store(M + n * nQ + iq, m, mask=iq < nQ)
    tl.store(C + n * nK + ik, c, mask=ik < nK)
    w = tl.where(there, tl.exp2(c), 0.0)
    u = r * _inverse(tl.sum(z * w[None, :], 1))
    tl.store(W + ik, w, mask=ik < nK)
    tl.store(U + iq, u, mask=iq < nQ)
    for t in range(0, PAIRS):
        sums = tl.sum(z * u[:, None], 0)
        if DAMPED:
            lse = c + tl.log2(tl.where(there, sums, 1.0))
            w = tl.where(there, tl.exp2(c + lam * (lc - lse)), 0.0)
            tl.store(NRM + t * steps_k + ik, _inverse(sums), mask=ik < nK)
        else:
            w = tl.exp2(lc) * _inverse(sums)
        tl.store(W + (t + 1) * steps_k + ik, w, mask=ik < nK)
        if not EVEN or t < PAIRS - 1:
            u = r * _inverse(tl.sum(z * w[None, :], 1))
            tl.store(U + (t + 1) * steps_q + iq, u, mask=iq < nQ)
    v = load_rows(V + b * svb + h * svh, svn, ik, lc > ANY, dv, DV, DVB)
    p = z * u[:, None] * w[None, :]
    store_rows(O + b * sob + h * soh, son, iq, iq < nQ, dv, product(p.to(v.dtype), v, PRECISION), DV, DVB)


@triton.jit
def backward(
    Q, K, V, BIAS, LR, LC, SCALE, LAM, O, DO, U, W, NRM, M, C, DELTA, FB, GB, DQ, DK, DV_, DBIAS, DSCALE,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sgb, sgh, sgn, sbb, sbh, sbq, sbk,
    slrb, slrh, slcb, slch, ssb, ssh, slb, slh, sdqb, sdqh, sdqn, sdkb, sdkh, sdkn, sdvb, sdvh, sdvn,
    scale, uniform, heads, nQ, nK, N, PAIRS,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of one head; STEPS, FB and GB as of the kernel with all keys on chip."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    iq, ik, d, dv = tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, DB), tl.arange(0, DVB)
    if BIAS is not None:
        BIAS += b * sbb + h * sbh
    if LR is not None:
        LR += b * slrb + h * slrh
        LC += b * slcb + h * slch
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32)
    scale2 = scale * LOG2E
    lam = 1.0
    if DAMPED:
        lam = tl.load(LAM + b * slb + h * slh).to(tl.float32)
        NRM += n * nK
    steps_q, steps_k = (n * 0 + N) * nQ, (n * 0 + N) * nK
    U += n * nQ
    W += n * nK
    if FB is not None:
        FB += n * nQ
    if GB is not None:
        GB += n * nK
    lr = log_marginal(LR, iq, nQ, 0.0)
    lc = log_marginal(LC, ik, nK, uniform)
    inverse = tl.exp2(-tl.maximum(lr, -100.0))
    m = tl.load(M + n * nQ + iq, mask=iq < nQ, other=0.0)
    c = tl.load(C + n * nK + ik, mask=ik < nK, other=0.0)
    q = load_rows(Q + b * sqb + h * sqh, sqn, iq, lr > ANY, d, D, DB)
    kt = load_columns(K + b * skb + h * skh, skn, ik, lc > ANY, d, D, DB)
    s = scores(q, kt, scale2, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
    s += tl.where(lr > ANY, 0.0, NONE)[:, None] + tl.where(lc > ANY, 0.0, NONE)[None, :]
    z = tl.exp2(s - m[:, None] - c[None, :])
    do = load_rows(DO + b * sgb + h * sgh, sgn, iq, lr > ANY, dv, DV, DVB)
    o = load_rows(O + b * sob + h * soh, son, iq, lr > ANY, dv, DV, DVB)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + n * nQ + iq, delta, mask=iq < nQ)
    u = tl.load(U + (PAIRS - 1 if EVEN else PAIRS) * steps_q + iq, mask=iq < nQ, other=0.0)
    w = tl.load(W + PAIRS * steps_k + ik, mask=ik < nK, other=0.0)
    p = z * u[:, None] * w[None, :]
    grad_v = product(tl.trans(p.to(do.dtype)), do, PRECISION)
    store_rows(DV_ + b * sdvb + h * sdvh, sdvn, ik, ik < nK, dv, grad_v, DV, DVB)
    v = load_rows(V + b * svb + h * svh, svn, ik, lc > ANY, dv, DV, DVB)
    gb = tl.sum(v.to(tl.float32) * grad_v, 1)
    a = product(do, tl.trans(v), PRECISION)
    if not EVEN:
        a -= (delta * inverse)[:, None]
        gb -= tl.sum(p * (delta * inverse)[:, None], 0)
    a = a * u[:, None] * w[None, :]
    if STEPS:
        for step in range(0, PAIRS):
            t = PAIRS - 1 - step
            if GB is not None:
                tl.store(GB + t * steps_k + ik, gb, mask=ik < nK)
            if DAMPED:
                x = lam * gb * tl.load(NRM + t * steps_k + ik, mask=ik < nK, other=0.0)
            else:
                x = gb * w * tl.where(lc > ANY, tl.exp2(-lc), 0.0)
            u = tl.load(U + t * steps_q + iq, mask=iq < nQ, other=0.0)
            w = tl.load(W + t * steps_k + ik, mask=ik < nK, other=0.0)
            fb = -u * tl.sum(z * x[None, :], 1)
            if EVEN:
                fb += tl.where(step == 0, delta, 0.0)
            if FB is not None:
                tl.store(FB + t * steps_q + iq, fb, mask=iq < nQ)
            fb = fb * inverse * u
            a -= u[:, None] * x[None, :]
            a -= fb[:, None] * w[None, :]
            gb = -w * tl.sum(z * fb[:, None], 0)
    elif EVEN:
        w = tl.load(W + (PAIRS - 1) * steps_k + ik, mask=ik < nK, other=0.0)
        a -= (u * delta * inverse)[:, None] * w[None, :]
    a = z * a
    if DBIAS is not None:
        at = DBIAS + n * nQ * nK + iq[:, None] * nK + ik[None, :]
        tl.store(at, a, mask=(iq < nQ)[:, None] & (ik < nK)[None, :])
    ds = a.to(q.dtype)
    grad_q = product(ds, tl.trans(kt), PRECISION)
    if DSCALE is not None:
        tl.store(DSCALE + n, tl.sum(grad_q * q.to(tl.float32)))
    store_rows(DQ + b * sdqb + h * sdqh, sdqn, iq, iq < nQ, d, grad_q * scale, D, DB)
    grad_k = product(tl.trans(ds), q, PRECISION)
    store_rows(DK + b * sdkb + h * sdkh, sdkn, ik, ik < nK, d, grad_k * scale, D, DB)
