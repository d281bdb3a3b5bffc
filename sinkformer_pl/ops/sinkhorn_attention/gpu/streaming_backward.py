"""Gradients at any length, in memory O(Q + K): a pass for each half-step, for dV, for dQ and for dK."""

import triton
import triton.language as tl

from sinkformer_pl.ops.sinkhorn_attention.gpu.streaming_forward import gather
from sinkformer_pl.ops.sinkhorn_attention.gpu.tiles import (
    ANY,
    LOG2E,
    NONE,
    add_product,
    load_columns,
    load_rows,
    log_marginal,
    product,
    ratio,
    real_tokens,
    scores,
    store_rows,
)


@triton.jit
def output_cotangents(
    O, DO, F, F_LAST, DELTA, CE, sob, soh, son, sgb, sgh, sgn, heads, nQ, blocks,
    DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, DAMPED: tl.constexpr,
):  # fmt: skip
    """DELTA = O·dO, the cotangent of the last row step; and the term CE of the first row step, where F is given."""
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    iq = (pid % blocks) * BQ + tl.arange(0, BQ)
    inside = iq < nQ
    dv = tl.arange(0, DVB)
    last = tl.load(F_LAST + n * nQ + iq, mask=inside, other=NONE)
    o = load_rows(O + b * sob + h * soh, son, iq, last > ANY, dv, DV, DVB)
    do = load_rows(DO + b * sgb + h * sgh, sgn, iq, last > ANY, dv, DV, DVB)
    tl.store(DELTA + n * nQ + iq, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=inside)
    if F is not None:
        f = tl.load(F + n * nQ + iq, mask=inside, other=NONE)
        tl.store(CE + n * nQ + iq, f if DAMPED else ratio(f, last), mask=inside)


@triton.jit
def value_gradients(
    Q, K, V, BIAS, LR, SCALE, LAM, DO, F, G, G_BEFORE, NU, DELTA, DV_, GB, LAM_GB, XE, WE,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sbb, sbh, sbq, sbk, slrb, slrh, ssb, ssh, slb, slh,
    sdvb, sdvh, sdvn, scale, heads, nQ, nK, blocks,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, MASKED: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dV, and the cotangent of the potential of the keys: V_j·dV_j, without EVEN less what the last row step takes.

    With STEPS the terms of the last column step are stored, see `_store_key_terms`; else the cotangent, GB.
    """
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    ik = (pid % blocks) * BK + tl.arange(0, BK)
    d, dv = tl.arange(0, DB), tl.arange(0, DVB)
    Q += b * sqb + h * sqh
    DO += b * sgb + h * sgh
    if BIAS is not None:
        BIAS += b * sbb + h * sbh
    if LR is not None:
        LR += b * slrb + h * slrh
    scale = scale * LOG2E
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32) * LOG2E
    g = tl.load(G + n * nK + ik, mask=ik < nK, other=NONE)
    k = load_rows(K + b * skb + h * skh, skn, ik, g > ANY, d, D, DB)
    grad_v = tl.zeros([BK, DVB], tl.float32)
    passed_on = tl.zeros([BK], tl.float32)
    for start in range(0, nQ, BQ):
        iq = start + tl.arange(0, BQ)
        f = tl.load(F + n * nQ + iq, mask=iq < nQ, other=NONE)
        real = real_tokens(f, iq, nQ, MASKED)
        qt = load_columns(Q, sqn, iq, real, d, D, DB)
        do = load_rows(DO, sgn, iq, real, dv, DV, DVB)
        s = scores(k, qt, scale, BIAS, sbk, sbq, ik, iq, nK, nQ, PRECISION)
        p = tl.exp2(s + g[:, None] + f[None, :])
        grad_v = add_product(p.to(do.dtype), do, grad_v, PRECISION)
        if not EVEN:
            delta = tl.load(DELTA + n * nQ + iq, mask=iq < nQ, other=0.0)
            lr = log_marginal(LR, iq, nQ, 0.0)
            passed_on += tl.sum(p * (delta * tl.exp2(-tl.maximum(lr, -100.0)))[None, :], 1)
    v = load_rows(V + b * svb + h * svh, svn, ik, g > ANY, dv, DV, DVB)
    store_rows(DV_ + b * sdvb + h * sdvh, sdvn, ik, ik < nK, dv, grad_v, DV, DVB)
    gb = tl.sum(v.to(tl.float32) * grad_v, 1) - passed_on
    if STEPS:
        lam = 1.0
        if DAMPED:
            lam = tl.load(LAM + b * slb + h * slh).to(tl.float32)
        _store_key_terms(gb, lam, g, G_BEFORE, NU, GB, LAM_GB, XE, WE, n * nK + ik, ik < nK, DAMPED)
    else:
        tl.store(GB + n * nK + ik, gb, mask=ik < nK)


@triton.jit
def _store_key_terms(gb, lam, g_last, G_BEFORE, NU, GB, LAM_GB, XE, WE, at, inside, DAMPED: tl.constexpr):
    """Store the cotangent gb of a column step, GB where it is wanted, lam times it, and its terms, XE and WE.

    G_BEFORE is the potential before the step, NU minus the log-sum-exp of the columns in it.
    """
    now_g = tl.load(G_BEFORE + at, mask=inside, other=NONE)
    nu = tl.load(NU + at, mask=inside, other=NONE)
    if GB is not None:
        tl.store(GB + at, gb, mask=inside)
    gb = gb * lam
    tl.store(LAM_GB + at, gb, mask=inside)
    if DAMPED:
        tl.store(XE + at, gb, mask=inside)
        tl.store(WE + at, ratio(now_g, nu), mask=inside)
    else:
        tl.store(XE + at, gb * ratio(nu, g_last), mask=inside)
        tl.store(WE + at, ratio(now_g, g_last), mask=inside)


@triton.jit
def row_cotangents(
    Q, K, BIAS, SCALE, LR, F, F_LAST, NU, LAM_GB, DELTA, FB, INVERSE_FB, CE, CF,
    sqb, sqh, sqn, skb, skh, skn, sbb, sbh, sbq, sbk, ssb, ssh, slrb, slrh, scale, heads, nQ, nK, blocks,
    D: tl.constexpr, DB: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
    DAMPED: tl.constexpr, MASKED: tl.constexpr, FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """The cotangent of a row step from that of the column step after it, and its terms, CE and CF."""
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    iq = (pid % blocks) * BA + tl.arange(0, BA)
    inside = iq < nQ
    if LR is not None:
        LR += b * slrb + h * slrh
    scale = scale * LOG2E
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32) * LOG2E
    f = tl.load(F + n * nQ + iq, mask=inside, other=NONE)
    fb = -gather(
        Q, K, BIAS, NU, LAM_GB, sqb, sqh, sqn, skb, skh, skn, sbb, sbh, sbq, sbk, scale, f, n, b, h, iq, nQ, nK,
        D, DB, BA, BB, PRECISION, MASKED,
    )  # fmt: skip
    at = n * nQ + iq
    if FROM_OUTPUT:
        fb += tl.load(DELTA + at, mask=inside, other=0.0)
    if FB is not None:
        tl.store(FB + at, fb, mask=inside)
    fb = fb * tl.exp2(-tl.maximum(log_marginal(LR, iq, nQ, 0.0), -100.0))
    tl.store(INVERSE_FB + at, fb, mask=inside)
    if DAMPED:
        tl.store(CE + at, f, mask=inside)
        tl.store(CF + at, fb, mask=inside)
    else:
        e = ratio(f, tl.load(F_LAST + at, mask=inside, other=NONE))
        tl.store(CE + at, e, mask=inside)
        tl.store(CF + at, fb * e, mask=inside)


@triton.jit
def column_cotangents(
    Q, K, BIAS, SCALE, LAM, F, G, NU, INVERSE_FB, G_LAST, G_BEFORE, NU_BEFORE, GB, LAM_GB, XE, WE,
    sqb, sqh, sqn, skb, skh, skn, sbb, sbh, sbq, sbk, ssb, ssh, slb, slh, scale, heads, nQ, nK, blocks,
    D: tl.constexpr, DB: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
    DAMPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The cotangent of a column step from that of the row step after it, which F and G are before; and its terms."""
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    ik = (pid % blocks) * BA + tl.arange(0, BA)
    inside = ik < nK
    scale = scale * LOG2E
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32) * LOG2E
    lam = 1.0
    if DAMPED:
        lam = tl.load(LAM + b * slb + h * slh).to(tl.float32)
    g = tl.load(G + n * nK + ik, mask=inside, other=NONE)
    nu = tl.load(NU + n * nK + ik, mask=inside, other=NONE)
    y = gather(
        K, Q, BIAS, F, INVERSE_FB, skb, skh, skn, sqb, sqh, sqn, sbb, sbh, sbk, sbq, scale, nu, n, b, h, ik, nK, nQ,
        D, DB, BA, BB, PRECISION, MASKED,
    )  # fmt: skip
    g_last = tl.load(G_LAST + n * nK + ik, mask=inside, other=NONE)
    _store_key_terms(
        -y * ratio(g, nu), lam, g_last, G_BEFORE, NU_BEFORE, GB, LAM_GB, XE, WE, n * nK + ik, inside, DAMPED
    )


@triton.jit
def _less_term(a, s, CE, CF, XE, WE, NU, at_q, at_k, n, iq, ik, nQ, nK, DAMPED: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Subtract the term of one column step from a: (queries, keys), or (keys, queries) with KEYS_FIRST."""
    e = tl.load(CE + at_q + iq, mask=iq < nQ, other=NONE if DAMPED else 0.0)
    c = tl.load(CF + at_q + iq, mask=iq < nQ, other=0.0)
    x = tl.load(XE + at_k + ik, mask=ik < nK, other=0.0)
    w = tl.load(WE + at_k + ik, mask=ik < nK, other=0.0)
    if KEYS_FIRST:
        e, c, x, w = e[None, :], c[None, :], x[:, None], w[:, None]
    else:
        e, c, x, w = e[:, None], c[:, None], x[None, :], w[None, :]
    if DAMPED:
        nu = tl.load(NU + at_k + n * nK + ik, mask=ik < nK, other=NONE)
        nu = nu[:, None] if KEYS_FIRST else nu[None, :]
        a -= tl.exp2(s + nu + e) * (x + c * w)
    else:
        a -= e * x
        a -= c * w
    return a


@triton.jit
def query_gradients(
    Q, K, V, BIAS, LR, SCALE, DO, F, G, NU, DELTA, CE, CF, XE, WE, FB, DQ, DSCALE,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sbb, sbh, sbq, sbk, slrb, slrh, ssb, ssh,
    sdqb, sdqh, sdqn, scale, heads, nQ, nK, N, terms, blocks,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, MASKED: tl.constexpr, LAST_ROW: tl.constexpr,
    TERMS: tl.constexpr, OPEN: tl.constexpr, FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Compute dQ from the gradient P (dO V^T - delta) - sum_t N_t (XE_t + CF_t WE_t) of the scores.

    `keys_on_chip.backward` explains it. N_t is P times CE_t and a vector of the keys which XE_t and WE_t hold already;
    with DAMPED it is 2^(s + CE_t + NU_t).
    LAST_ROW: whether there is the term with delta. OPEN: whether CF_0 isn't known yet: the cotangent of the first row
    step is a sum over the keys, and what depends on it is gathered apart; it is stored for the gradient of the keys.
    FROM_OUTPUT: whether that cotangent starts at delta. TERMS: their number, 0 where `terms` is one that isn't worth a
    kernel of its own.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    iq = block * BQ + tl.arange(0, BQ)
    inside = iq < nQ
    d, dv = tl.arange(0, DB), tl.arange(0, DVB)
    K += b * skb + h * skh
    V += b * svb + h * svh
    if BIAS is not None:
        BIAS += b * sbb + h * sbh
    if LR is not None:
        LR += b * slrb + h * slrh
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32)
    scale2 = scale * LOG2E
    steps_q, steps_k = (n * 0 + N) * nQ, (n * 0 + N) * nK
    CE += n * nQ
    CF += n * nQ
    XE += n * nK
    WE += n * nK
    f = tl.load(F + n * nQ + iq, mask=inside, other=NONE)
    delta = tl.load(DELTA + n * nQ + iq, mask=inside, other=0.0)
    inverse = tl.exp2(-tl.maximum(log_marginal(LR, iq, nQ, 0.0), -100.0))
    q = load_rows(Q + b * sqb + h * sqh, sqn, iq, f > ANY, d, D, DB)
    do = load_rows(DO + b * sgb + h * sgh, sgn, iq, f > ANY, dv, DV, DVB)
    grad_q = tl.zeros([BQ, DB], tl.float32)
    gathered = tl.zeros([BQ], tl.float32)
    if OPEN:
        open_q = tl.zeros([BQ, DB], tl.float32)
        e = tl.load(CE + iq, mask=inside, other=NONE if DAMPED else 0.0)
    for start in range(0, nK, BK):
        ik = start + tl.arange(0, BK)
        g = tl.load(G + n * nK + ik, mask=ik < nK, other=NONE)
        real = real_tokens(g, ik, nK, MASKED)
        kt = load_columns(K, skn, ik, real, d, D, DB)
        vt = load_columns(V, svn, ik, real, dv, DV, DVB)
        s = scores(q, kt, scale2, BIAS, sbq, sbk, iq, ik, nQ, nK, PRECISION)
        p = tl.exp2(s + g[None, :] + f[:, None])
        a = product(do, vt, PRECISION)
        if LAST_ROW:
            a = a - (delta * inverse)[:, None]
        if DAMPED:
            a = p * a
        # A loop inside keeps Triton from overlapping the loads of this one with its products.
        if TERMS > 0:
            for t in tl.static_range(1 if OPEN else 0, TERMS):
                a = _less_term(a, s, CE, CF, XE, WE, NU, t * steps_q, t * steps_k, n, iq, ik, nQ, nK, DAMPED, False)
        else:
            for t in range(1 if OPEN else 0, terms):
                a = _less_term(a, s, CE, CF, XE, WE, NU, t * steps_q, t * steps_k, n, iq, ik, nQ, nK, DAMPED, False)
        if OPEN:
            x = tl.load(XE + ik, mask=ik < nK, other=0.0)
            w = tl.load(WE + ik, mask=ik < nK, other=0.0)
            if DAMPED:
                nu = tl.load(NU + n * nK + ik, mask=ik < nK, other=NONE)
                columns = tl.exp2(s + nu[None, :] + e[:, None])
                closed = columns * x[None, :]
                gathered += tl.sum(closed, 1)
                a -= closed
            else:
                columns = p
                gathered += tl.sum(p * x[None, :], 1)
                a -= e[:, None] * x[None, :]
            open_q = add_product((columns * w[None, :]).to(q.dtype), tl.trans(kt), open_q, PRECISION)
        ds = a if DAMPED else p * a
        grad_q = add_product(ds.to(q.dtype), tl.trans(kt), grad_q, PRECISION)
    if OPEN:
        fb = -gathered if DAMPED else -gathered * e
        if FROM_OUTPUT:
            fb += delta
        if FB is not None:
            tl.store(FB + n * nQ + iq, fb, mask=inside)
        c = fb * inverse if DAMPED else fb * inverse * e
        tl.store(CF + iq, c, mask=inside)
        grad_q -= c[:, None] * open_q
    store_rows(DQ + b * sdqb + h * sdqh, sdqn, iq, inside, d, grad_q * scale, D, DB)
    if DSCALE is not None:
        tl.store(DSCALE + n * blocks + block, tl.sum(grad_q * q.to(tl.float32)))


@triton.jit
def key_gradients(
    Q, K, V, BIAS, LR, SCALE, DO, F, G, NU, DELTA, CE, CF, XE, WE, DK, DBIAS,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sbb, sbh, sbq, sbk, slrb, slrh, ssb, ssh,
    sdkb, sdkh, sdkn, scale, heads, nQ, nK, N, terms, blocks,
    D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, DAMPED: tl.constexpr, MASKED: tl.constexpr, LAST_ROW: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Compute dK of the same gradient of the scores, and that gradient itself where the bias wants it."""
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    b, h = n // heads, n % heads
    ik = (pid % blocks) * BK + tl.arange(0, BK)
    inside = ik < nK
    d, dv = tl.arange(0, DB), tl.arange(0, DVB)
    Q += b * sqb + h * sqh
    DO += b * sgb + h * sgh
    if BIAS is not None:
        BIAS += b * sbb + h * sbh
    if LR is not None:
        LR += b * slrb + h * slrh
    if SCALE is not None:
        scale = tl.load(SCALE + b * ssb + h * ssh).to(tl.float32)
    scale2 = scale * LOG2E
    steps_q, steps_k = (n * 0 + N) * nQ, (n * 0 + N) * nK
    CE += n * nQ
    CF += n * nQ
    XE += n * nK
    WE += n * nK
    g = tl.load(G + n * nK + ik, mask=inside, other=NONE)
    k = load_rows(K + b * skb + h * skh, skn, ik, g > ANY, d, D, DB)
    v = load_rows(V + b * svb + h * svh, svn, ik, g > ANY, dv, DV, DVB)
    grad_k = tl.zeros([BK, DB], tl.float32)
    for start in range(0, nQ, BQ):
        iq = start + tl.arange(0, BQ)
        f = tl.load(F + n * nQ + iq, mask=iq < nQ, other=NONE)
        real = real_tokens(f, iq, nQ, MASKED)
        q = load_rows(Q, sqn, iq, real, d, D, DB)
        do = load_rows(DO, sgn, iq, real, dv, DV, DVB)
        s = scores(k, tl.trans(q), scale2, BIAS, sbk, sbq, ik, iq, nK, nQ, PRECISION)
        p = tl.exp2(s + g[:, None] + f[None, :])
        a = product(v, tl.trans(do), PRECISION)
        if LAST_ROW:
            delta = tl.load(DELTA + n * nQ + iq, mask=iq < nQ, other=0.0)
            inverse = tl.exp2(-tl.maximum(log_marginal(LR, iq, nQ, 0.0), -100.0))
            a = a - (delta * inverse)[None, :]
        if DAMPED:
            a = p * a
        if TERMS > 0:
            for t in tl.static_range(0, TERMS):
                a = _less_term(a, s, CE, CF, XE, WE, NU, t * steps_q, t * steps_k, n, iq, ik, nQ, nK, DAMPED, True)
        else:
            for t in range(0, terms):
                a = _less_term(a, s, CE, CF, XE, WE, NU, t * steps_q, t * steps_k, n, iq, ik, nQ, nK, DAMPED, True)
        ds = a if DAMPED else p * a
        if DBIAS is not None:
            at = DBIAS + n * nQ * nK + iq[None, :] * nK + ik[:, None]
            tl.store(at, ds, mask=(iq < nQ)[None, :] & inside[:, None])
        grad_k = add_product(ds.to(q.dtype), q, grad_k, PRECISION)
    store_rows(DK + b * sdkb + h * sdkh, sdkn, ik, inside, d, grad_k * scale, D, DB)
