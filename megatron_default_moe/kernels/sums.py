"""The statistics of one micro-batch in one launch: expert sums, router mass and load (Triton).

Legend: T tokens, E experts, e experts of this rank, D width of an expert's output, R rows the
local experts returned (sorted by expert), C chunks. ``maths/functional.py`` has the same maths.

Bytes: R D rows read once; per chunk and block one vector of partial sums goes out and comes back,
``8 (C + e) D`` bytes, which the choice of C keeps to a few percent (mostly inside the L2 cache).

How the work is divided. A program per (expert, block of columns) would leave most of the device
idle when a rank has one or two large experts, and would wait for the fullest expert when the load
is uneven. So rows are cut into equal chunks, whoever they belong to, and a program takes one chunk
and one block of columns: few large experts and many small ones give the same even work. An expert
inside one chunk is added to its sum at once. One that spans several leaves a partial sum in each,
and the program that finishes it last (it draws the last ticket) adds them up in the order of the
rows: the same bits whoever is last. There is no atomic addition of values, and the division
depends on shapes alone, not on the device, so a run repeats itself; determinism is no option here
because there is nothing to gain without it.

Slot ``c + i`` holds the partial sum of chunk c and expert i: along the sorted rows both only grow,
so no two pairs share a slot.
"""

# Triton's own values have no Python type, so its functions carry no annotations but constexpr.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from megatron_default_moe.maths.functional import Weighting

BLOCK_D = 256
"""Columns of a program: 512 bytes of each bf16 row."""
_BLOCK_R = 16
_MIN_CHUNK = 128
_PROGRAMS = 2048
"""Programs to aim at: two waves of eight per multiprocessor on today's devices."""
_TOKEN_CHUNKS = 64


class StatisticsOut(NamedTuple):
    """Where :func:`add_statistics` adds to; float32, contiguous."""

    sums_eD: Tensor
    """[e, D] sums of the local experts' rows (``functional.expert_sums``)."""
    mass_E: Tensor
    """[E] the weights of the tokens routed here (``functional.router_mass``)."""
    load_E: Tensor
    """[E] tokens routed to each expert."""
    tokens: Tensor
    """[1] tokens seen."""


def num_tickets(num_local_experts: int, width: int) -> int:
    """Length of the int32 buffer of zeros that :func:`add_statistics` needs and leaves at zero."""
    return num_local_experts * triton.cdiv(width, BLOCK_D) + 1


@triton.jit
def _last_to_arrive(ticket, arrivals):
    """Whether this program is the last of ``arrivals``; then what the others stored is visible."""
    # All of this program's threads must have stored before one of them draws the ticket.
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if is_last:
        tl.store(ticket, 0)
    return is_last


@triton.jit
def _sum_of_rows(
    rows, row_stride, row_probs, low, high, offs_d, D,
    UNIFORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D] float32 sum of rows ``low`` to ``high``."""
    acc_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        in_r = offs_r < high
        p_R = tl.load(row_probs + offs_r, mask=in_r, other=0.0).to(tl.float32)
        pointers = rows + offs_r.to(tl.int64)[:, None] * row_stride + offs_d[None, :]
        x_RD = tl.load(pointers, mask=in_r[:, None] & (offs_d < D)[None, :], other=0.0)
        counts_R1 = (p_R != 0)[:, None]
        x_RD = tl.where(counts_R1, x_RD.to(tl.float32), 0.0)
        if UNIFORM:
            x_RD = x_RD / tl.where(counts_R1, p_R[:, None], 1.0)
        acc_RD += x_RD
    return tl.sum(acc_RD, axis=0)


@triton.jit
def _expert_part(
    chunk, block_d, rows, row_stride, row_probs, counts, partials, tickets, sums, R, D, e,
    chunk_rows,
    UNIFORM: tl.constexpr, LOCAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add one chunk of rows, in one block of columns, to the sums of the experts they belong to."""
    offs_d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    offs_e = tl.arange(0, LOCAL)
    counts_e = tl.load(counts + offs_e, mask=offs_e < e, other=0).to(tl.int32)
    ends_e = tl.minimum(tl.cumsum(counts_e, 0), R)
    row0 = chunk * chunk_rows
    row1 = tl.minimum(row0 + chunk_rows, R)
    first = tl.sum((ends_e <= row0).to(tl.int32))
    beyond = tl.minimum(tl.sum((ends_e - counts_e < row1).to(tl.int32)), e)
    for i in range(first, beyond):
        end = tl.sum(tl.where(offs_e == i, ends_e, 0))
        start = end - tl.sum(tl.where(offs_e == i, counts_e, 0))
        low, high = tl.maximum(start, row0), tl.minimum(end, row1)
        if low < high:
            sum_D = _sum_of_rows(
                rows, row_stride, row_probs, low, high, offs_d, D, UNIFORM, BLOCK_R, BLOCK_D
            )
            target = sums + i * D + offs_d
            first_chunk = start // chunk_rows
            num_chunks = (end - 1) // chunk_rows - first_chunk + 1
            if num_chunks == 1:
                tl.store(target, tl.load(target, mask=in_d) + sum_D, mask=in_d)
            else:
                tl.store(partials + (chunk + i).to(tl.int64) * D + offs_d, sum_D, mask=in_d)
                ticket = tickets + i * tl.cdiv(D, BLOCK_D) + block_d
                if _last_to_arrive(ticket, num_chunks):
                    acc_CD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
                    for c in range(0, num_chunks, BLOCK_R):
                        offs_c = c + tl.arange(0, BLOCK_R)
                        slots_C = (first_chunk + i + offs_c).to(tl.int64)
                        acc_CD += tl.load(
                            partials + slots_C[:, None] * D + offs_d[None, :],
                            mask=(offs_c < num_chunks)[:, None] & in_d[None, :],
                            other=0.0,
                            cache_modifier=".cg",
                        )
                    total_D = tl.sum(acc_CD, axis=0)
                    tl.store(target, tl.load(target, mask=in_d) + total_D, mask=in_d)


@triton.jit
def _router_part(
    chunk, num_chunks, probs, partials, ticket, mass, load, tokens, T, E, chunk_tokens,
    UNIFORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Add one chunk of tokens to the mass and load of the experts they are routed to."""
    offs_e = tl.arange(0, WIDTH)
    in_e = offs_e < E
    mass_TE = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    load_TE = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    for start in range(chunk * chunk_tokens, tl.minimum((chunk + 1) * chunk_tokens, T), BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        inside = (offs_t < T)[:, None] & in_e[None, :]
        offsets = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
        p_TE = tl.load(probs + offsets, mask=inside, other=0.0).to(tl.float32)
        mass_TE += p_TE
        load_TE += (p_TE != 0).to(tl.float32)
    tl.store(partials + (2 * chunk) * E + offs_e, tl.sum(mass_TE, axis=0), mask=in_e)
    tl.store(partials + (2 * chunk + 1) * E + offs_e, tl.sum(load_TE, axis=0), mask=in_e)
    if _last_to_arrive(ticket, num_chunks):
        mass_TE = tl.zeros([BLOCK_T, WIDTH], tl.float32)
        load_TE = tl.zeros([BLOCK_T, WIDTH], tl.float32)
        for c in range(0, num_chunks, BLOCK_T):
            offs_c = c + tl.arange(0, BLOCK_T)
            inside = (offs_c < num_chunks)[:, None] & in_e[None, :]
            slots = partials + 2 * offs_c[:, None] * E + offs_e[None, :]
            mass_TE += tl.load(slots, mask=inside, other=0.0, cache_modifier=".cg")
            load_TE += tl.load(slots + E, mask=inside, other=0.0, cache_modifier=".cg")
        load_E = tl.sum(load_TE, axis=0)
        mass_E = load_E if UNIFORM else tl.sum(mass_TE, axis=0)
        tl.store(mass + offs_e, tl.load(mass + offs_e, mask=in_e) + mass_E, mask=in_e)
        tl.store(load + offs_e, tl.load(load + offs_e, mask=in_e) + load_E, mask=in_e)
        tl.store(tokens, tl.load(tokens) + T)


@triton.jit
def statistics_kernel(
    rows, row_stride, row_probs, counts, row_partials, sums, R, D, e, chunk_rows,
    probs, token_partials, mass, load, tokens, T, E, chunk_tokens, num_token_chunks,
    tickets,
    UNIFORM: tl.constexpr, LOCAL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The first ``num_token_chunks`` programs look at the routing, the others at the rows."""
    program = tl.program_id(0)
    blocks_d = tl.cdiv(D, BLOCK_D)
    if program < num_token_chunks:
        _router_part(
            program, num_token_chunks, probs, token_partials, tickets + e * blocks_d,
            mass, load, tokens, T, E, chunk_tokens, UNIFORM, WIDTH, BLOCK_T,
        )  # fmt: skip
    else:
        program -= num_token_chunks
        _expert_part(
            program // blocks_d, program % blocks_d, rows, row_stride, row_probs, counts,
            row_partials, tickets, sums, R, D, e, chunk_rows, UNIFORM, LOCAL, BLOCK_R, BLOCK_D,
        )  # fmt: skip


def row_chunks(num_rows: int, width: int) -> tuple[int, int]:
    """Return (rows of a chunk, number of chunks) for ``num_rows`` rows; a rule of shapes alone."""
    wanted = max(1, _PROGRAMS // triton.cdiv(width, BLOCK_D))
    rows = max(_MIN_CHUNK, triton.cdiv(triton.cdiv(num_rows, wanted), _BLOCK_R) * _BLOCK_R)
    return rows, triton.cdiv(num_rows, rows)


def blocks(num_local: int, num_experts: int) -> dict[str, int]:
    """Block sizes of the launch; a rule of shapes alone."""
    padded = int(triton.next_power_of_2(num_experts))
    return {
        **{"LOCAL": int(triton.next_power_of_2(num_local)), "WIDTH": padded},
        **{"BLOCK_R": _BLOCK_R, "BLOCK_D": BLOCK_D, "BLOCK_T": max(1, 2048 // padded)},
    }


def add_statistics(
    rows_RD: Tensor,
    tokens_per_expert_e: Tensor,
    probs_R: Tensor,
    probs_TE: Tensor,
    weighting: Weighting,
    tickets: Tensor,
    out: StatisticsOut,
) -> None:
    """Add a micro-batch's expert sums, router mass, load and tokens to ``out``: one launch.

    Equals ``functional.expert_sums`` and ``functional.router_mass``, without a host-device
    synchronisation wherever the counts are, and bit for bit the same every time.

    Args:
        rows_RD: [R, D] expert outputs sorted by expert, bf16, fp16 or fp32; rows beyond the counts
            and rows of probability zero count as nothing, whatever they hold.
        tokens_per_expert_e: [e] integer row counts, on the device or on the host.
        probs_R: [R] router probability of each row.
        probs_TE: [T, E] the probabilities of the routing, of this rank's tokens; zero at the
            experts that a token does not use.
        weighting: ``router`` or ``uniform``.
        tickets: :func:`num_tickets` int32 zeros; zero again when the launch ends. Launches that
            may run at the same time need one each.
        out: what is added to.
    """
    (num_rows, width), num_local = rows_RD.shape, tokens_per_expert_e.numel()
    num_tokens, num_experts = probs_TE.shape
    rows_RD = rows_RD.detach()
    if rows_RD.stride(1) != 1:
        rows_RD = rows_RD.contiguous()
    sizes = blocks(num_local, num_experts)
    block_t = sizes["BLOCK_T"]
    chunk_tokens = triton.cdiv(triton.cdiv(num_tokens, _TOKEN_CHUNKS), block_t) * block_t
    num_token_chunks = triton.cdiv(num_tokens, chunk_tokens) if num_tokens else 0
    chunk_rows, num_chunks = row_chunks(num_rows, width)
    num_programs = num_token_chunks + num_chunks * triton.cdiv(width, BLOCK_D)
    if num_programs == 0:
        return
    row_slots = num_chunks + num_local
    scratch = out.sums_eD.new_empty(row_slots * width + 2 * num_token_chunks * num_experts)
    statistics_kernel[(num_programs,)](
        rows_RD, rows_RD.stride(0), probs_R.detach().reshape(-1),
        tokens_per_expert_e.to(rows_RD.device, non_blocking=True), scratch, out.sums_eD,
        num_rows, width, num_local, chunk_rows,
        probs_TE.detach().contiguous(), scratch[row_slots * width :],
        out.mass_E, out.load_E, out.tokens, num_tokens, num_experts, chunk_tokens,
        num_token_chunks, tickets,
        UNIFORM=weighting == "uniform", **sizes,
    )  # fmt: skip
