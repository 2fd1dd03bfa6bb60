# SPDX-License-Identifier: Apache-2.0
"""Check every kernel against its reference on a GPU at the published models' shapes, then time it against its floor.

A floor is the larger of bytes over the copy bandwidth and operations over the matmul rate, both measured in the same run.
Every candidate is captured into a graph of launches over rotating inputs (more bytes than the L2 cache holds, where the op
streams weights or keys) and replayed; the figure is the median replay over the number of launches. `--sweep` adds
tilings of attention and library alternatives; `scripts.benchmarks.tiles` chooses those of products. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ThreadPoolExecutor

import torch

from fastdllm import whole
from fastdllm.arguments import Parser, output_file
from fastdllm.shell import one_line

with one_line("kernels"):  # an environment without Triton is one line
    import triton

    from scripts.benchmarks.decode import usable
    from scripts.benchmarks.kernel_cases import DEVICE, Case, Run, cases, rand


def compile_all(case: Case) -> None:
    """Run every candidate once, in threads (compiling releases the GIL). One that cannot run here is dropped, with a word,
    unless it is what the package launches."""

    def attempt(name: str) -> Exception | None:
        torch.cuda.synchronize()  # gives the thread the context of the device, which tensor descriptors need
        try:
            case.runs[name](0)
            torch.cuda.synchronize()
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            return error
        return None

    with ThreadPoolExecutor(16) as pool:
        ours = [name for name in case.runs if not name.startswith("sdpa")]
        failures = dict(zip(ours, pool.map(attempt, ours), strict=True))
    # The choice of an SDPA backend is global to the process: one at a time.
    failures |= {name: attempt(name) for name in list(case.runs) if name not in failures}
    for name, error in failures.items():
        if error is not None:
            if name in ("kernel", "layers"):
                raise error
            print(f"{case.op} {case.shape} {name}: {str(error).splitlines()[0]}")
            del case.runs[name]


def check(case: Case) -> None:
    """Every candidate against the reference, on poisoned memory; raises where one is wrong."""
    if case.want is None:
        return
    want = case.want(0)
    for name, run in case.runs.items():
        if name == "cublas alone":
            continue  # logits, not their statistics
        torch.empty(int(2e8), dtype=torch.uint8, device=DEVICE).fill_(255)
        got = run(0)
        error = ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9)).item()
        if not error <= case.ratio:
            raise AssertionError(f"{case.op} {case.shape} {name}: error ratio {error:.2e} exceeds {case.ratio:.0e}")
        case.results[name] = {"error": error}


def measure(run: Run, copies: int) -> float:
    """Median seconds of one launch, over replays of a graph of at least 16 launches."""
    launches = -(-16 // copies) * copies
    run(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i % copies)
    graph.replay()
    times = []
    for _ in range(15):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / launches)
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Copy bandwidth (bytes read plus written a second) and bf16 matmul rate (operations a second)."""
    a, b = torch.randint(0, 2**30, (2, 2**29), dtype=torch.int32, device=DEVICE)
    copy = 2 * a.nbytes / measure(lambda i: torch.neg(a, out=b), 1)
    x, y = rand(8192, 8192), rand(8192, 8192)
    return copy, 2 * 8192**3 / measure(lambda i: x @ y, 1)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="time attention's tilings and library alternatives too")
    parser.add_argument("--only", help="one op: attention, linear, head_confidence, ..., layers")
    parser.add_argument("--kind", help="only weights of one kind: bf16, fp8, int8, int4 (of the ops that have weights)")
    parser.add_argument("--json", type=output_file, help="also write every figure to this file")
    args = parser.parse_args()
    usable("cuda")
    copy, matmul = ceilings()
    device = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{device}, {versions}: {copy / 1e12:.2f} TB/s, {matmul / 1e12:.0f} TFLOP/s")
    report: list[dict[str, object]] = []
    print(f"{'op':<16}{'shape':<34}{'candidate':<26}{'us':>9}{'floor us':>10}{'x floor':>9}{'error':>10}")
    for op, make in cases(args.sweep):
        if args.only not in (None, op):
            continue
        case = make()
        if args.kind is not None and case.shape.split()[-1] != args.kind:
            continue
        compile_all(case)
        check(case)
        floor = max(case.nbytes / copy, case.flops / matmul)
        for name, run in case.runs.items():
            seconds = measure(run, case.copies)
            result = case.results.get(name, {}) | {"us": seconds * 1e6, "floor_us": floor * 1e6}
            report.append({"op": case.op, "shape": case.shape, "candidate": name, **result})
            print(
                f"{case.op:<16}{case.shape:<34}{name:<26}{seconds * 1e6:>9.1f}{floor * 1e6:>10.1f}"
                f"{seconds / floor:>9.2f}{result.get('error', float('nan')):>10.1e}",
                flush=True,
            )
        del case
        torch.cuda.empty_cache()
    line = json.dumps({"device": device, "torch": torch.__version__, "copy": copy, "matmul": matmul, "results": report})
    if args.json:
        whole.write_text(args.json, line)
    print(line)


if __name__ == "__main__":
    with one_line("kernels"):
        main()
