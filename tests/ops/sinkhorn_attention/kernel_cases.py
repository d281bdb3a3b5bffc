"""Cases of the kernels for GPUs against the reference in float64: `python kernel_cases.py KIND... [all]`.

On a machine without CUDA run it with TRITON_INTERPRET=1, in a process of its own: the variable is read when a kernel is
defined. It prints a line for each case that fails, and at the end how many were tried.
"""

import itertools
import math
import random
import sys
import traceback

import torch

from sinkformer_pl.ops import AttentionMask, sinkhorn_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUT = {torch.float32: {1: 2e-6, 10: 5e-6, 50: 1e-5}, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
PARAMETERS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SIZES = {
    "keys on chip": [(21, 35, 12, 20), (70, 16, 32, 32), (16, 128, 32, 32), (2, 64, 32, 32), (65, 65, 8, 48)],
    "queries on chip": [(16, 300, 12, 20), (21, 290, 32, 16), (1, 260, 16, 16)],
    "on chip": [(21, 35, 12, 20), (48, 64, 32, 32), (1, 9, 16, 24)],
    "streaming": [(33, 20, 130, 20), (20, 33, 16, 140), (70, 80, 130, 20)],
}
HALF_STEPS = {
    "keys on chip": [1, 2, 3, 4, 5],
    "queries on chip": [2, 3, 4, 5],
    "on chip": [7, 8, 21],
    "streaming": [1, 2, 3, 4, 5],
}
FEATURES = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "gradient": ["unrolled", "detached"],
    "mask": [None, "some", "an empty sample"],
    "marginals": [False, True],
    "lam": [1.0, 0.5, "learned"],
    "bias": [None, "full", "broadcast", "forbidding"],
    "scale": ["default", "learned"],
    "strides": ["tokens first", "contiguous", "a part"],
    "std": [1, 10],
}


def pairwise(factors: dict[str, list], seed: int) -> list[dict]:
    """Return few cases in which every two values of different factors meet."""
    names, generator = list(factors), random.Random(seed)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while open_pairs:
        best, covered = None, set()
        (a, i), (b, j) = sorted(open_pairs)[0]
        for _ in range(60):
            case = {name: generator.randrange(len(values)) for name, values in factors.items()} | {a: i, b: j}
            chosen = [(name, case[name]) for name in names]
            found = open_pairs & set(itertools.combinations(chosen, 2))
            if len(found) > len(covered):
                best, covered = case, found
        open_pairs -= covered
        cases.append({name: factors[name][index] for name, index in best.items()})
    return cases


def tokens(generator, n, width, dtype, strides, heads=2, samples=2):
    """Return (B, H, N, width) with some strides."""
    if strides == "contiguous":
        return torch.randn(samples, heads, n, width, generator=generator).to(dtype)
    if strides == "tokens first":
        return torch.randn(samples, n, heads, width, generator=generator).to(dtype).transpose(1, 2)
    return torch.randn(samples, n + 3, heads, width + 5, generator=generator).to(dtype)[:, 3:, :, 5:].transpose(1, 2)


def problem(size, case):
    """Return the arguments of `sinkhorn_attention`, all on the CPU, and the upstream gradient."""
    queries, keys, width, value_width = size
    generator = torch.Generator().manual_seed(queries * 7 + keys)
    draws = [
        tokens(generator, n, d, case["dtype"], case["strides"])
        for n, d in ((queries, width), (keys, width), (keys, value_width))
    ]
    upstream = tokens(generator, queries, value_width, case["dtype"], case["strides"])
    arguments = {"scale": case["std"] / math.sqrt(width), "gradient": case["gradient"], "lam": case["lam"]}
    if case["scale"] == "learned":
        arguments["scale"] = arguments["scale"] * torch.tensor([0.7, 1.2])
    if case["lam"] == "learned":
        arguments["lam"] = torch.tensor([0.3, 0.9])
    real_queries, real_keys = (torch.ones(2, n, dtype=torch.bool) for n in (queries, keys))
    if case["mask"]:
        real_queries, real_keys = (torch.rand(2, n, generator=generator) > 0.3 for n in (queries, keys))
        real_queries[:, queries // 2] = real_keys[:, keys // 2] = True
        if case["mask"] == "an empty sample":
            real_keys[1] = False
        arguments["mask"] = AttentionMask(real_queries, real_keys)
        # What padding holds must change nothing.
        draws[0].masked_fill_(~real_queries[:, None, :, None], 7.0)
        draws[1].masked_fill_(~real_keys[:, None, :, None], math.inf)
        draws[2].masked_fill_(~real_keys[:, None, :, None], -math.inf)
        upstream = upstream * real_queries[:, None, :, None]
    if case["marginals"]:
        row, column = (
            (torch.rand(2, 2, n, generator=generator) + 0.2) * real[:, None]
            for n, real in ((queries, real_queries), (keys, real_keys))
        )
        column = column * (row.sum(-1, keepdim=True) / column.sum(-1, keepdim=True).clamp(min=1e-9))
        row = row * (column.sum(-1, keepdim=True) > 0)
        arguments |= {"row_marginal": row, "column_marginal": column}
    if case["bias"]:
        shape = (2, queries, keys) if case["bias"] == "broadcast" else (2, 2, queries, keys)
        bias = torch.randn(shape, generator=generator)
        if case["bias"] == "forbidding":
            bias[..., :, keys // 3] = -math.inf
            bias[:, 0, queries // 2] = -1e9
            bias[:, 1, :, keys // 2] = torch.finfo(torch.float32).min
        if case["bias"] == "far below":
            bias = bias.zero_()
            bias[..., 1] = -400
        arguments["bias"] = bias
    return draws, arguments, upstream


def run(draws, arguments, upstream, n_iters, backend, dtype, device):
    """Return output, gradients of q, k, v and of what else is learned by name, and the info."""

    def moved(value):
        if isinstance(value, AttentionMask):
            return AttentionMask(value.query.to(device), value.key.to(device))
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()

    # A copy would be contiguous.
    inputs = [tensor.detach().to(device, dtype).requires_grad_() for tensor in draws]
    others = {name: moved(value) for name, value in arguments.items()}
    output, info = sinkhorn_attention(*inputs, n_iters=n_iters, backend=backend, return_info=True, **others)
    query = inputs[0]
    if backend == "triton" and min(query.shape[1:3]) > 1:
        assert (output.stride(1) < output.stride(2)) == (query.stride(1) < query.stride(2)), (
            "the output is laid out anew"
        )
    learned = {name: value for name, value in others.items() if isinstance(value, torch.Tensor)}
    found = torch.autograd.grad(output, [*inputs, *learned.values()], upstream.to(device, dtype), allow_unused=True)
    results = {"output": output, **dict(zip(("q", "k", "v", *learned), found, strict=True))}
    return {name: None if tensor is None else tensor.detach().double().cpu() for name, tensor in results.items()}, info


def check(size, n_iters, case):
    """Return what is wrong with a case, "" if nothing."""
    draws, arguments, upstream = problem(size, case)
    dtype = case["dtype"]
    found, info = run(draws, arguments, upstream, n_iters, "triton", dtype, DEVICE)
    wanted, exact_info = run(draws, arguments, upstream, n_iters, "reference", torch.float64, "cpu")
    q, k, v = (tensor.double().nan_to_num(0.0, 0.0, 0.0) for tensor in draws)
    mask = arguments.get("mask", AttentionMask())
    scale = arguments["scale"]
    scale = scale[:, None, None].double() if isinstance(scale, torch.Tensor) else scale
    scores = scale * q @ k.mT + (0 if "bias" not in arguments else arguments["bias"].double())
    plan = (scores + exact_info.f[..., None] + exact_info.g[..., None, :]).exp().where(mask.allowed(scores), 0.0)
    terms = (plan * (upstream.double() @ v.mT)).abs()
    # What a gradient is measured against where its terms cancel: the sum of their sizes.
    sizes = {
        "q": scale * terms @ k.abs(),
        "k": scale * terms.mT @ q.abs(),
        "scale": (terms * (q.abs() @ k.abs().mT)).sum((0, -2, -1)),
        "row_marginal": terms.sum(-1),
        "column_marginal": terms.sum(-2),
        "lam": terms.sum((0, -2, -1)),
        "bias": terms,
    }
    bounds = {"output": OUTPUT[dtype], "v": GRADIENT[dtype], "q": GRADIENT[dtype], "k": GRADIENT[dtype]}
    problems = []
    for name, value in wanted.items():
        if value is None:
            continue
        bound = bounds.get(name, PARAMETERS[dtype])
        bound = bound[case["std"]] if isinstance(bound, dict) else bound
        if case["bias"] == "far below":  # scores of 400 themselves are rounded by that much
            bound = max(bound, 5e-6)
        if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off where a GPU rounds
            bound = 2 * bound
        size_of = torch.maximum(sizes.get(name, value).norm(), value.norm()).clamp(min=1e-9)
        error = float((found[name] - value).norm() / size_of)
        if not error <= bound:
            problems.append(f"{name}: {error:.1e} > {bound:.0e}")
    if DEVICE == "cuda":  # started as it was remembered
        again, _ = run(draws, arguments, upstream, n_iters, "triton", dtype, DEVICE)
        same = {name: value is None or torch.equal(value, again[name]) for name, value in found.items()}
        problems += [f"{name} is another one the second time" for name, equal in same.items() if not equal]
    exact, near = exact_info.residual, info.residual.double().cpu()
    if not torch.allclose(near, exact, rtol=1e-2, atol=2e-2 if dtype != torch.float32 else 1e-4):
        problems.append(f"residual {near.tolist()}, not {exact.tolist()}")
    return ", ".join(problems)


PLAIN = {
    "dtype": torch.float32,
    "gradient": "unrolled",
    "mask": None,
    "marginals": False,
    "lam": 1.0,
    "bias": None,
    "scale": "default",
    "strides": "tokens first",
    "std": 1,
}
IMPLICIT = [{}, {"lam": "learned", "mask": "some"}, {"bias": "full", "dtype": torch.float16}]


def cases(kind, everything):
    """Return (size, half-steps, case) of one kind of kernel."""
    sizes = [size for size in SIZES[kind] if everything or kind == "queries on chip" or max(size[:2]) < 200]
    chosen = [
        (case.pop("size"), case.pop("n_iters"), case)
        for case in pairwise(FEATURES | {"size": sizes, "n_iters": HALF_STEPS[kind]}, seed=0)
    ]
    largest = {
        "keys on chip": [(16, 128, 32, 32), (2, 64, 32, 32), (16, 256, 32, 32)],
        "streaming": [(20, 33, 16, 140), (260, 270, 12, 20)],
    }.get(kind, [SIZES[kind][1]])
    steps = HALF_STEPS[kind][2]
    chosen += [(size, steps, PLAIN | {"std": 50}) for size in largest]
    chosen += [(SIZES[kind][0], steps, PLAIN | {"bias": "far below", "lam": lam}) for lam in (1.0, 0.5)]
    if not everything:
        chosen = chosen[:: 8 if kind == "on chip" else 12]
    # The implicit gradient runs the same kernels in both.
    if kind == "keys on chip" or (kind == "streaming" and everything):
        implicit = IMPLICIT if everything else IMPLICIT[1:2]
        chosen += [(SIZES[kind][0], 31, PLAIN | {"gradient": "implicit"} | more) for more in implicit]
    return chosen


if __name__ == "__main__":
    from sinkformer_pl.ops.sinkhorn_attention.gpu import problem as kernel_problem

    torch.set_num_threads(1)
    everything, ran = "all" in sys.argv, set()
    choose = kernel_problem.choose

    def remembering(*arguments):
        """Note the kind that was chosen."""
        choice = choose(*arguments)
        ran.add(choice.kind)
        return choice

    kernel_problem.choose = remembering
    tried = [case for kind in sys.argv[1:] if kind != "all" for case in cases(kind, everything)]
    for size, n_iters, case in tried:
        try:
            wrong = check(size, n_iters, case)
        except Exception:
            wrong = traceback.format_exc(limit=-3)
        if wrong:
            print(f"{size}, {n_iters} half-steps, {case}: {wrong}", flush=True)
    print(f"{len(tried)} cases, kernels: {', '.join(sorted(ran))}")
