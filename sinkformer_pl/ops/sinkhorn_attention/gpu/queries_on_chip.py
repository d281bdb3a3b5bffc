"""One program a head, all queries on chip, keys in chunks: a column step and the row step after it are one pass."""

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
    scores,
    store_rows,
)

HALF_FACTOR = tl.constexpr(128.0)  # keeps small weights of float16 from its subnormal numbers; they are at most 256


@triton.jit
def _column_and_row_step(
    q, K, V, f, lr, BIAS, LC, G, G_NEXT, NU, o, skn, svn, sbq, sbk, scale, uniform, lam, nQ, nK,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store the potentials of the keys; return those of the queries and, where it is the last, the output."""
    d, dv, iq = tl.arange(0, DB), tl.arange(0, DVB), tl.arange(0, BQ)
    total = tl.zeros([BQ], tl.float32)
    shift = tl.full([BQ], NONE, tl.float32)
    factor = 1.0
    if V.dtype.element_ty == tl.float16:
        factor = HALF_FACTOR
    for start in range(0, nK, BK):
        ik = start + tl.arange(0, BK)
        inside = ik < nK
        lc = log_marginal(LC, ik, nK, uniform)
        kt = load_columns(K, skn, ik, lc > ANY, d, D, DB)
        s = scores(q, kt, scale, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
        x = s + f[:, None]
        if FIRST or DAMPED:
            top = tl.max(x, 0)
        else:  # a column that summed to Q/K sums to at least 1/K after a row step
            g = tl.load(G + ik, mask=inside, other=NONE)
            top = tl.where(g > ANY, -g, -NONE)
        e = tl.exp2(x - top[None, :])
        sums = tl.sum(e, 0)
        lse = tl.where((tl.abs(top) < -ANY) & (sums > 0.0), top + tl.log2(sums), NONE)
        g = column_step(lse, lc, lam, DAMPED)
        tl.store(G_NEXT + ik, g, mask=inside)
        if DAMPED:
            tl.store(NU + ik, tl.where(g > ANY, -lse, NONE), mask=inside)
            if not EVEN or not LAST:
                y = s + g[None, :]
                higher = tl.maximum(shift, tl.max(y, 1))
                p = tl.exp2(y - higher[:, None])
                fade = tl.exp2(shift - higher)
                total = total * fade + tl.sum(p, 1)
                shift = higher
                o = o * fade[:, None] if LAST else o
            else:
                p = tl.exp2(x + g[None, :])
        else:
            p = e * tl.where(g > ANY, tl.exp2(lc) / sums, 0.0)[None, :]
            total += tl.sum(p, 1)
        if LAST:
            v = load_rows(V, svn, ik, lc > ANY, dv, DV, DVB)
            o = add_product((p * factor).to(v.dtype), v, o, PRECISION)
    if LAST:
        o = o * (1.0 / factor)
    if not EVEN or not LAST:
        if DAMPED:
            real = (f > ANY) & (shift > ANY)
            f = tl.where(real, lr - shift - tl.log2(total), NONE)
        else:
            real = (f > ANY) & (total > 0.0)
            f = tl.where(real, f + lr - tl.log2(total), NONE)
        if LAST:
            o = o * tl.where(real, tl.exp2(lr) / total, 0.0)[:, None]
    return f, o


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
    tl.static_assert(not SOFTMAX)
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    d, dv, iq = tl.arange(0, DB), tl.arange(0, DVB), tl.arange(0, BQ)
    K += b * skb + h * skh
    V += b * svb + h * svh
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
    lr = log_marginal(LR, iq, nQ, 0.0)
    q = load_rows(Q + b * sqb + h * sqh, sqn, iq, lr > ANY, d, D, DB)
    shift = tl.full([BQ], NONE, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    for start in range(0, nK, BK):
        ik = start + tl.arange(0, BK)
        lc = log_marginal(LC, ik, nK, uniform)
        g = tl.where(lc > ANY, 0.0, NONE)
        tl.store(G + ik, g, mask=ik < nK)
        kt = load_columns(K, skn, ik, lc > ANY, d, D, DB)
        s = scores(q, kt, scale, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION) + g[None, :]
        higher = tl.maximum(shift, tl.max(s, 1))
        total = total * tl.exp2(shift - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        shift = higher
    f = tl.where((lr > ANY) & (shift > ANY), lr - shift - tl.log2(total), NONE)
    tl.store(F + iq, f, mask=iq < nQ)
    tl.debug_barrier()
    o = tl.zeros([BQ, DVB], tl.float32)
    if PAIRS == 1:
        f, o = _column_and_row_step(
            q, K, V, f, lr, BIAS, LC, G, G + steps_k, NU, o, skn, svn, sbq, sbk, scale, uniform, lam, nQ, nK,
            D, DB, DV, DVB, BQ, BK, PRECISION, DAMPED, True, True, EVEN,
        )  # fmt: skip
    else:
        f, o = _column_and_row_step(
            q, K, V, f, lr, BIAS, LC, G, G + steps_k, NU, o, skn, svn, sbq, sbk, scale, uniform, lam, nQ, nK,
            D, DB, DV, DVB, BQ, BK, PRECISION, DAMPED, True, False, EVEN,
        )  # fmt: skip
        tl.store(F + steps_q + iq, f, mask=iq < nQ)
        tl.debug_barrier()
        for _ in range(1, PAIRS - 1):
            G += steps_k
            F += steps_q
            if DAMPED:
                NU += steps_k
            f, o = _column_and_row_step(
                q, K, V, f, lr, BIAS, LC, G, G + steps_k, NU, o, skn, svn, sbq, sbk, scale, uniform, lam, nQ, nK,
                D, DB, DV, DVB, BQ, BK, PRECISION, DAMPED, False, False, EVEN,
            )  # fmt: skip
            tl.store(F + steps_q + iq, f, mask=iq < nQ)
            tl.debug_barrier()
        G += steps_k
        F += steps_q
        if DAMPED:
            NU += steps_k
        f, o = _column_and_row_step(
            q, K, V, f, lr, BIAS, LC, G, G + steps_k, NU, o, skn, svn, sbq, sbk, scale, uniform, lam, nQ, nK,
            D, DB, DV, DVB, BQ, BK, PRECISION, DAMPED, False, True, EVEN,
        )  # fmt: skip
    if not EVEN:
        tl.store(F + steps_q + iq, f, mask=iq < nQ)
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
    """Gradients of one head; arguments as of the kernel with all keys on chip."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    d, dv, iq = tl.arange(0, DB), tl.arange(0, DVB), tl.arange(0, BQ)
    K += b * skb + h * skh
    V += b * svb + h * svh
    F += n * nQ
    G += n * nK
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
    lr = log_marginal(LR, iq, nQ, 0.0)
    inverse = tl.exp2(-tl.maximum(lr, -100.0))
    q = load_rows(Q + b * sqb + h * sqh, sqn, iq, lr > ANY, d, D, DB)
    do = load_rows(DO + b * sgb + h * sgh, sgn, iq, lr > ANY, dv, DV, DVB)
    o = load_rows(O + b * sob + h * soh, son, iq, lr > ANY, dv, DV, DVB)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + n * nQ + iq, delta, mask=iq < nQ)
    f = tl.load(F + (PAIRS - 1 if EVEN else PAIRS) * steps_q + iq, mask=iq < nQ, other=NONE)
    if STEPS:
        CF += n * nQ
        XE += n * nK
        WE += n * nK
        if FB is not None:
            FB += n * nQ
        if GB is not None:
            GB += n * nK

    # dV, and the cotangents of the last column step and of the row step before it.
    final = n * 0 + PAIRS - 1
    f_t = tl.load(F + final * steps_q + iq, mask=iq < nQ, other=NONE)
    gathered = tl.zeros([BQ], tl.float32)
    for start in range(0, nK, BK):
        ik = start + tl.arange(0, BK)
        inside = ik < nK
        lc = log_marginal(LC, ik, nK, uniform)
        kt = load_columns(K, skn, ik, lc > ANY, d, D, DB)
        v = load_rows(V, svn, ik, lc > ANY, dv, DV, DVB)
        g = tl.load(G + PAIRS * steps_k + ik, mask=inside, other=NONE)
        s = scores(q, kt, scale2, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
        p = tl.exp2(s + g[None, :] + f[:, None])
        grad_v = product(tl.trans(p.to(do.dtype)), do, PRECISION)
        store_rows(DV_ + b * sdvb + h * sdvh, sdvn, ik, inside, dv, grad_v, DV, DVB)
        if STEPS:
            gb = tl.sum(v.to(tl.float32) * grad_v, 1)
            if not EVEN:
                gb -= tl.sum(p * (delta * inverse)[:, None], 0)
            if GB is not None:
                tl.store(GB + final * steps_k + ik, gb, mask=inside)
            now_g = tl.load(G + final * steps_k + ik, mask=inside, other=NONE)
            if DAMPED:
                nu = tl.load(NU + final * steps_k + ik, mask=inside, other=NONE)
                gb = gb * lam
                tl.store(XE + final * steps_k + ik, gb, mask=inside)
                tl.store(WE + final * steps_k + ik, ratio(now_g, nu), mask=inside)
                gathered += tl.sum(tl.exp2(s + nu[None, :] + f_t[:, None]) * gb[None, :], 1)
            else:
                x = gb * tl.where(g > ANY, tl.exp2(-lc), 0.0)
                tl.store(XE + final * steps_k + ik, x, mask=inside)
                tl.store(WE + final * steps_k + ik, ratio(now_g, g), mask=inside)
                gathered += tl.sum(p * x[None, :], 1)
    if STEPS:
        for step in range(0, PAIRS):
            at = n * 0 + PAIRS - 1 - step
            f_t = tl.load(F + at * steps_q + iq, mask=iq < nQ, other=NONE)
            e = ratio(f_t, f)
            fb = -gathered
            if not DAMPED and step == 0:
                fb = fb * e
            if EVEN:
                fb += tl.where(step == 0, delta, 0.0)
            if FB is not None:
                tl.store(FB + at * steps_q + iq, fb, mask=iq < nQ)
            fb = fb * inverse
            tl.store(CF + at * steps_q + iq, fb if DAMPED else fb * e, mask=iq < nQ)
            gathered = tl.zeros([BQ], tl.float32)
            if at > 0:  # the column step before, and the row step before that
                f_before = tl.load(F + (at - 1) * steps_q + iq, mask=iq < nQ, other=NONE)
                back = ratio(f_before, f_t)
                for start in range(0, nK, BK):
                    ik = start + tl.arange(0, BK)
                    inside = ik < nK
                    lc = log_marginal(LC, ik, nK, uniform)
                    kt = load_columns(K, skn, ik, lc > ANY, d, D, DB)
                    g = tl.load(G + at * steps_k + ik, mask=inside, other=NONE)
                    s = scores(q, kt, scale2, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
                    rows = tl.exp2(s + g[None, :] + f_t[:, None])
                    gb = -tl.sum(rows * fb[:, None], 0)
                    if GB is not None:
                        tl.store(GB + (at - 1) * steps_k + ik, gb, mask=inside)
                    now_g = tl.load(G + (at - 1) * steps_k + ik, mask=inside, other=NONE)
                    if DAMPED:
                        nu = tl.load(NU + (at - 1) * steps_k + ik, mask=inside, other=NONE)
                        gb = gb * lam
                        tl.store(XE + (at - 1) * steps_k + ik, gb, mask=inside)
                        tl.store(WE + (at - 1) * steps_k + ik, ratio(now_g, nu), mask=inside)
                        gathered += tl.sum(tl.exp2(s + nu[None, :] + f_before[:, None]) * gb[None, :], 1)
                    else:
                        last_g = tl.load(G + PAIRS * steps_k + ik, mask=inside, other=NONE)
                        x = gb * tl.where(g > ANY, tl.exp2(-lc), 0.0)
                        tl.store(XE + (at - 1) * steps_k + ik, x * ratio(g, last_g), mask=inside)
                        tl.store(WE + (at - 1) * steps_k + ik, ratio(now_g, last_g), mask=inside)
                        gathered += tl.sum(rows * x[None, :], 1)
                if not DAMPED:
                    gathered = gathered * back
        tl.debug_barrier()

    grad_q = tl.zeros([BQ, DB], tl.float32)
    for start in range(0, nK, BK):
        ik = start + tl.arange(0, BK)
        inside = ik < nK
        lc = log_marginal(LC, ik, nK, uniform)
        kt = load_columns(K, skn, ik, lc > ANY, d, D, DB)
        v = load_rows(V, svn, ik, lc > ANY, dv, DV, DVB)
        g = tl.load(G + PAIRS * steps_k + ik, mask=inside, other=NONE)
        s = scores(q, kt, scale2, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
        p = tl.exp2(s + g[None, :] + f[:, None])
        a = product(do, tl.trans(v), PRECISION)
        if not EVEN:
            a = a - (delta * inverse)[:, None]
        if DAMPED:
            a = p * a
        if STEPS:
            for t in range(0, PAIRS):
                f_t = tl.load(F + t * steps_q + iq, mask=iq < nQ, other=NONE)
                fb = tl.load(CF + t * steps_q + iq, mask=iq < nQ, other=0.0)
                x = tl.load(XE + t * steps_k + ik, mask=inside, other=0.0)
                w = tl.load(WE + t * steps_k + ik, mask=inside, other=0.0)
                if DAMPED:
                    nu = tl.load(NU + t * steps_k + ik, mask=inside, other=NONE)
                    columns = tl.exp2(s + nu[None, :] + f_t[:, None])
                    a -= columns * (x[None, :] + fb[:, None] * w[None, :])
                else:
                    a -= ratio(f_t, f)[:, None] * x[None, :]
                    a -= fb[:, None] * w[None, :]
        elif EVEN:
            w = ratio(tl.load(G + (PAIRS - 1) * steps_k + ik, mask=inside, other=NONE), g)
            row = (delta * inverse)[:, None] * w[None, :]
            a -= p * row if DAMPED else row
        ds = a if DAMPED else p * a
        if DBIAS is not None:
            at = DBIAS + n * nQ * nK + iq[:, None] * nK + ik[None, :]
            tl.store(at, ds, mask=(iq < nQ)[:, None] & inside[None, :])
        ds = ds.to(q.dtype)
        grad_q = add_product(ds, tl.trans(kt), grad_q, PRECISION)
        grad_k = product(tl.trans(ds), q, PRECISION)
        store_rows(DK + b * sdkb + h * sdkh, sdkn, ik, inside, d, grad_k * scale, D, DB)
    store_rows(DQ + b * sdqb + h * sdqh, sdqn, iq, iq < nQ, d, grad_q * scale, D, DB)
    if DSCALE is not None:
        tl.store(DSCALE + n, tl.sum(grad_q * q.to(tl.float32)))
