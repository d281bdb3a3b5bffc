"""One program a head, all keys on chip, queries in chunks: a row step and the column step after it are one pass."""

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
    product,
    ratio,
    row_step,
    scores,
    store_rows,
)

UNDERFLOW = tl.constexpr(2.0**-60)  # a smaller sum may have lost terms


@triton.jit
def _row_step_and_column_sums(
    Q, kt, g, BIAS, LR, F, F_NEXT, sqn, sbq, sbk, scale, nQ, nK,
    D: tl.constexpr, DB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip
    """Store the potentials of the queries; return the log-sum-exp of the columns of s + f."""
    d, ik = tl.arange(0, DB), tl.arange(0, BK)
    sums = tl.zeros([BK], tl.float32)
    for start in range(0, nQ, BQ):
        iq = start + tl.arange(0, BQ)
        lr = log_marginal(LR, iq, nQ, 0.0)
        q = load_rows(Q, sqn, iq, lr > ANY, d, D, DB)
        s = scores(q, kt, scale, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION) + g[None, :]
        f = tl.load(F + iq, mask=iq < nQ, other=NONE) if not MAXIMUM else lr
        e, weight, f = row_step(s, f, lr, MAXIMUM)
        tl.store(F_NEXT + iq, f, mask=iq < nQ)
        sums += tl.sum(e * weight[:, None], 0)
    lse = tl.where(sums > 0.0, tl.log2(sums) - g, NONE)
    if MAXIMUM:
        # A column may lie so far below every row's maximum that its terms underflow: add them up around its maximum.
        if tl.min(tl.where(g > ANY, sums, 1.0), 0) < UNDERFLOW:
            sums = tl.zeros([BK], tl.float32)
            highest = tl.full([BK], NONE, tl.float32)
            for start in range(0, nQ, BQ):
                iq = start + tl.arange(0, BQ)
                lr = log_marginal(LR, iq, nQ, 0.0)
                q = load_rows(Q, sqn, iq, lr > ANY, d, D, DB)
                s = scores(q, kt, scale, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
                e, weight, f = row_step(s + g[None, :], lr, lr, MAXIMUM)
                s += f[:, None]
                higher = tl.maximum(highest, tl.max(s, 0))
                sums = sums * tl.exp2(highest - higher) + tl.sum(tl.exp2(s - higher[None, :]), 0)
                highest = higher
            lse = tl.where(highest > ANY, highest + tl.log2(sums), NONE)
    return lse


@triton.jit
def forward(
    Q, K, V, BIAS, LR, LC, SCALE, LAM, O, F, G, NU,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbq, sbk,
    slrb, slrh, slcb, slch, ssb, ssh, slb, slh,
    scale, uniform, heads, nQ, nK, N, PAIRS,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, SOFTMAX: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Half-steps and output of one head; F (row steps, N, Q), G (1 + PAIRS, N, K), NU (PAIRS, N, K) with DAMPED."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    d, dv, ik = tl.arange(0, DB), tl.arange(0, DVB), tl.arange(0, BK)
    Q += b * sqb + h * sqh
    F += n * nQ
    G += n * nK
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
        NU += n * nK
    steps_q, steps_k = (n * 0 + N) * nQ, (n * 0 + N) * nK
    lc = log_marginal(LC, ik, nK, uniform)
    kt = load_columns(K + b * skb + h * skh, skn, ik, lc > ANY, d, D, DB)
    g = tl.where(lc > ANY, 0.0, NONE)
    tl.store(G + ik, g, mask=ik < nK)
    if not SOFTMAX:
        lse = _row_step_and_column_sums(
            Q, kt, g, BIAS, LR, F, F, sqn, sbq, sbk, scale, nQ, nK, D, DB, BQ, BK, PRECISION, True
        )  # fmt: skip
        g = column_step(lse, lc, lam, DAMPED)
        tl.store(G + steps_k + ik, g, mask=ik < nK)
        if DAMPED:
            tl.store(NU + ik, tl.where(g > ANY, -lse, NONE), mask=ik < nK)
        tl.debug_barrier()  # the potentials of a step are read in the next, by other threads
        for t in range(1, PAIRS):
            row, column = t * steps_q, t * steps_k
            lse = _row_step_and_column_sums(
                Q, kt, g, BIAS, LR, F + row - steps_q, F + row, sqn, sbq, sbk, scale, nQ, nK,
                D, DB, BQ, BK, PRECISION, DAMPED,
            )  # fmt: skip
            g = column_step(lse, lc, lam, DAMPED)
            tl.store(G + column + steps_k + ik, g, mask=ik < nK)
            if DAMPED:
                tl.store(NU + column + ik, tl.where(g > ANY, -lse, NONE), mask=ik < nK)
            tl.debug_barrier()
    v = load_rows(V + b * svb + h * svh, svn, ik, lc > ANY, dv, DV, DVB)
    last = (n * 0 + PAIRS - 1) * steps_q
    for start in range(0, nQ, BQ):
        iq = start + tl.arange(0, BQ)
        lr = log_marginal(LR, iq, nQ, 0.0)
        q = load_rows(Q, sqn, iq, lr > ANY, d, D, DB)
        s = scores(q, kt, scale, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION) + g[None, :]
        f = lr
        if not SOFTMAX:
            f = tl.load(F + last + iq, mask=iq < nQ, other=NONE)
        if EVEN:
            p = tl.exp2(s + f[:, None])
        else:
            p, weight, f = row_step(s, f, lr, SOFTMAX or DAMPED)
            tl.store(F + last + steps_q + iq, f, mask=iq < nQ)
            if v.dtype == tl.float16:  # which has no room for what a row has before its weight
                p = p * weight[:, None]
        o = product(p.to(v.dtype), v, PRECISION)
        if not EVEN and v.dtype != tl.float16:
            o = o * weight[:, None]
        store_rows(O + b * sob + h * soh, son, iq, iq < nQ, dv, o, DV, DVB)


@triton.jit
def backward(
    Q, K, V, BIAS, LR, LC, SCALE, LAM, O, DO, F, G, NU, DELTA, FB, CF, GB, XE, WE, DQ, DK, DV_, DBIAS, DSCALE,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sgb, sgh, sgn, sbb, sbh, sbq, sbk,
    slrb, slrh, slcb, slch, ssb, ssh, slb, slh, sdqb, sdqh, sdqn, sdkb, sdkh, sdkn, sdvb, sdvh, sdvn,
    scale, uniform, heads, nQ, nK, N, PAIRS,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of one head. STEPS: whether the gradient goes back through the column steps ("unrolled").

    Scratch: DELTA (N, Q); CF (PAIRS, N, Q), XE and WE (PAIRS, N, K), the terms of the half-steps: the gradient of the
    scores is P (dO V^T - delta) - sum_t N_t (XE_t + CF_t WE_t), N_t being the columns' softmax of step t. Without
    DAMPED N_t is P times vectors. FB and GB, the cotangents of f and g, are stored where they are given.
    """
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    d, dv, ik = tl.arange(0, DB), tl.arange(0, DVB), tl.arange(0, BK)
    Q += b * sqb + h * sqh
    O += b * sob + h * soh
    DO += b * sgb + h * sgh
    F += n * nQ
    G += n * nK
    DELTA += n * nQ
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
        NU += n * nK
    steps_q, steps_k = (n * 0 + N) * nQ, (n * 0 + N) * nK
    lc = log_marginal(LC, ik, nK, uniform)
    kt = load_columns(K + b * skb + h * skh, skn, ik, lc > ANY, d, D, DB)
    g = tl.load(G + PAIRS * steps_k + ik, mask=ik < nK, other=NONE)
    F_LAST = F + PAIRS * steps_q
    if EVEN:
        F_LAST = F + (PAIRS - 1) * steps_q

    grad_v = tl.zeros([BK, DVB], tl.float32)
    passed_on = tl.zeros([BK], tl.float32)
    for start in range(0, nQ, BQ):
        iq = start + tl.arange(0, BQ)
        inside = iq < nQ
        lr = log_marginal(LR, iq, nQ, 0.0)
        q = load_rows(Q, sqn, iq, lr > ANY, d, D, DB)
        do = load_rows(DO, sgn, iq, lr > ANY, dv, DV, DVB)
        o = load_rows(O, son, iq, lr > ANY, dv, DV, DVB)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(DELTA + iq, delta, mask=inside)
        f = tl.load(F_LAST + iq, mask=inside, other=NONE)
        s = scores(q, kt, scale2, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
        p = tl.exp2(s + g[None, :] + f[:, None])
        grad_v = add_product(tl.trans(p.to(do.dtype)), do, grad_v, PRECISION)
        if not EVEN:
            passed_on += tl.sum(p * (delta * tl.exp2(-tl.maximum(lr, -100.0)))[:, None], 0)
    v = load_rows(V + b * svb + h * svh, svn, ik, lc > ANY, dv, DV, DVB)
    store_rows(DV_ + b * sdvb + h * sdvh, sdvn, ik, ik < nK, dv, grad_v, DV, DVB)
    gb = tl.sum(v.to(tl.float32) * grad_v, 1) - passed_on
    tl.debug_barrier()

    if STEPS:
        CF += n * nQ
        XE += n * nK
        WE += n * nK
        if FB is not None:
            FB += n * nQ
        if GB is not None:
            GB += n * nK
        next_g = g
        for step in range(0, PAIRS):
            at = n * 0 + PAIRS - 1 - step
            if GB is not None:
                tl.store(GB + at * steps_k + ik, gb, mask=ik < nK)
            now_g = tl.load(G + at * steps_k + ik, mask=ik < nK, other=NONE)
            if DAMPED:
                nu = tl.load(NU + at * steps_k + ik, mask=ik < nK, other=NONE)
                gb = gb * lam
                tl.store(XE + at * steps_k + ik, gb, mask=ik < nK)
                tl.store(WE + at * steps_k + ik, ratio(now_g, nu), mask=ik < nK)
            else:
                nu = tl.where(next_g > ANY, next_g - lc, NONE)
                tl.store(XE + at * steps_k + ik, gb * ratio(nu, g), mask=ik < nK)
                tl.store(WE + at * steps_k + ik, ratio(now_g, g), mask=ik < nK)
            if at > 0:
                gathered = tl.zeros([BK], tl.float32)
                for start in range(0, nQ, BQ):
                    iq = start + tl.arange(0, BQ)
                    inside = iq < nQ
                    lr = log_marginal(LR, iq, nQ, 0.0)
                    q = load_rows(Q, sqn, iq, lr > ANY, d, D, DB)
                    f = tl.load(F + at * steps_q + iq, mask=inside, other=NONE)
                    s = scores(q, kt, scale2, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
                    columns = tl.exp2(s + nu[None, :] + f[:, None])
                    fb = -tl.sum(columns * gb[None, :], 1)
                    if EVEN:
                        fb += tl.where(step == 0, tl.load(DELTA + iq, mask=inside, other=0.0), 0.0)
                    if FB is not None:
                        tl.store(FB + at * steps_q + iq, fb, mask=inside)
                    fb = fb * tl.exp2(-tl.maximum(lr, -100.0))
                    last = tl.load(F_LAST + iq, mask=inside, other=NONE)
                    tl.store(CF + at * steps_q + iq, fb if DAMPED else fb * ratio(f, last), mask=inside)
                    gathered += tl.sum(columns * fb[:, None], 0)
                gb = -gathered * ratio(now_g, nu)
                next_g = now_g
        tl.debug_barrier()

    k = tl.trans(kt)
    grad_k = tl.zeros([BK, DB], tl.float32)
    grad_scale = tl.zeros([BQ], tl.float32)
    for start in range(0, nQ, BQ):
        iq = start + tl.arange(0, BQ)
        inside = iq < nQ
        lr = log_marginal(LR, iq, nQ, 0.0)
        q = load_rows(Q, sqn, iq, lr > ANY, d, D, DB)
        do = load_rows(DO, sgn, iq, lr > ANY, dv, DV, DVB)
        delta = tl.load(DELTA + iq, mask=inside, other=0.0)
        inverse = tl.exp2(-tl.maximum(lr, -100.0))
        f = tl.load(F_LAST + iq, mask=inside, other=NONE)
        s = scores(q, kt, scale2, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
        p = tl.exp2(s + g[None, :] + f[:, None])
        a = product(do, tl.trans(v), PRECISION)
        if not EVEN:
            a = a - (delta * inverse)[:, None]
        if DAMPED:
            a = p * a
        if STEPS:
            first = tl.load(F + iq, mask=inside, other=NONE)
            x = tl.load(XE + ik, mask=ik < nK, other=0.0)
            w = tl.load(WE + ik, mask=ik < nK, other=0.0)
            if DAMPED:
                nu = tl.load(NU + ik, mask=ik < nK, other=NONE)
                columns = tl.exp2(s + nu[None, :] + first[:, None])
                fb = -tl.sum(columns * x[None, :], 1)
            else:
                e = ratio(first, f)
                fb = -tl.sum(p * x[None, :], 1) * e
            if EVEN:
                fb += tl.where(PAIRS == 1, delta, 0.0)
            if FB is not None:
                tl.store(FB + iq, fb, mask=inside)
            fb = fb * inverse
            if DAMPED:
                a -= columns * (x[None, :] + fb[:, None] * w[None, :])
            else:
                a -= e[:, None] * x[None, :]
                a -= (e * fb)[:, None] * w[None, :]
            for t in range(1, PAIRS):
                f_t = tl.load(F + t * steps_q + iq, mask=inside, other=NONE)
                fb = tl.load(CF + t * steps_q + iq, mask=inside, other=0.0)
                x = tl.load(XE + t * steps_k + ik, mask=ik < nK, other=0.0)
                w = tl.load(WE + t * steps_k + ik, mask=ik < nK, other=0.0)
                if DAMPED:
                    nu = tl.load(NU + t * steps_k + ik, mask=ik < nK, other=NONE)
                    columns = tl.exp2(s + nu[None, :] + f_t[:, None])
                    a -= columns * (x[None, :] + fb[:, None] * w[None, :])
                else:
                    a -= ratio(f_t, f)[:, None] * x[None, :]
                    a -= fb[:, None] * w[None, :]
        elif EVEN:  # the last row step alone, before a column step that is held constant
            w = ratio(tl.load(G + (PAIRS - 1) * steps_k + ik, mask=ik < nK, other=NONE), g)
            row = p * (delta * inverse)[:, None] * w[None, :] if DAMPED else (delta * inverse)[:, None] * w[None, :]
            a -= row
        ds = a if DAMPED else p * a
        if DBIAS is not None:
            at = DBIAS + n * nQ * nK + iq[:, None] * nK + ik[None, :]
            tl.store(at, ds, mask=inside[:, None] & (ik < nK)[None, :])
        ds = ds.to(q.dtype)
        grad_q = product(ds, k, PRECISION)
        if DSCALE is not None:
            grad_scale += tl.sum(grad_q * q.to(tl.float32), 1)
        store_rows(DQ + b * sdqb + h * sdqh, sdqn, iq, inside, d, grad_q * scale, D, DB)
        grad_k = add_product(tl.trans(ds), q, grad_k, PRECISION)
    store_rows(DK + b * sdkb + h * sdkh, sdkn, ik, ik < nK, d, grad_k * scale, D, DB)
    if DSCALE is not None:
        tl.store(DSCALE + n, tl.sum(grad_scale, 0))
