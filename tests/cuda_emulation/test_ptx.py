"""Each device wrapper compiles to the expected instruction and operands, which the emulation cannot check."""

from __future__ import annotations

import re
import shutil

import pytest
from cuda_emulation.build import ROOT
from cuda_emulation.ptx import Call, compile_ptx, instructions

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

MAP = "const __grid_constant__ CUtensorMap map"
NOTHING = "int unused"
EVICT_NORMAL, EVICT_FIRST, EVICT_LAST = (0x1000000000000000, 0x12F0000000000000, 0x14F0000000000000)
PREDICATE = ".reg .pred p;"


def named(count: int, prefix: str = "") -> str:
    """Coordinates c0, c1 ..., as parameters or operands."""
    return ", ".join(f"{prefix}c{i}" for i in range(count))


# arch -> (parameters, statement, instructions)
WRAPPERS: dict[str, list[tuple[str, str, list[str]]]] = {
    "80": [
        (NOTHING, "block_sync();", ["bar.sync 0;"]),
        ("uint32_t mask", "warp_sync(mask);", ["bar.warp.sync mask;"]),
        ("int id, int threads", "named_barrier_sync(id, threads);", ["bar.sync id, threads;"]),
        ("int id, int threads", "named_barrier_arrive(id, threads);", ["bar.arrive id, threads;"]),
        (NOTHING, "device_fence();", ["membar.gl;"]),
        (
            "uint32_t* semaphore, uint32_t* y",
            "*y = semaphore_load_acquire(semaphore);",
            ["ld.acquire.gpu.global.u32 out, [semaphore];"],
        ),
        (
            "uint32_t* semaphore, uint32_t value",
            "semaphore_add_release(semaphore, value);",
            ["red.release.gpu.global.add.u32 [semaphore], value;"],
        ),
        (
            "uint32_t* counter, uint32_t value, uint32_t* y",
            "*y = counter_fetch_add(counter, value);",
            ["atom.global.add.u32 out, [counter], value;"],
        ),
        (
            "float x, int l, float* y",
            "*y = shuffle_xor(x, l);",
            ["shfl.sync.bfly.b32 out|out, x, l, 31, -1;"],
        ),
        (
            "float x, int l, float* y",
            "*y = shuffle_down(x, l);",
            ["shfl.sync.down.b32 out|out, x, l, 31, -1;"],
        ),
        ("float x, int l, float* y", "*y = shuffle_up(x, l);", ["shfl.sync.up.b32 out|out, x, l, 0, -1;"]),
        ("float x, int l, float* y", "*y = shuffle(x, l);", ["shfl.sync.idx.b32 out|out, x, l, 31, -1;"]),
        (
            "int x, uint32_t mask, uint32_t* y",
            "*y = ballot(x != 0, mask);",
            ["vote.sync.ballot.b32 out, setp(x, 0), mask;"],
        ),
        (
            "const void* source, uint4* y",
            "*y = ld_global_16(source);",
            ["ld.global.nc.L1::no_allocate.v4.u32 {out, out, out, out}, [source];"],
        ),
        (
            "void* y, uint32_t a, uint32_t b, uint32_t c, uint32_t d",
            "st_global_16(y, make_uint4(a, b, c, d));",
            ["st.global.L1::no_allocate.v4.u32 [y], {a, b, c, d};"],
        ),
        (
            "void* destination, const void* source, int bytes",
            "cp_async_16(destination, source, bytes);",
            ["cp.async.cg.shared.global [shared(destination)], [source], 16, bytes;"],
        ),
        (NOTHING, "cp_async_commit();", ["cp.async.commit_group;"]),
        (NOTHING, "cp_async_wait<2>();", ["cp.async.wait_group 2;"]),
        ("float x, float* y", "*y = exp2_approx(x);", ["ex2.approx.ftz.f32 out, x;"]),
        ("float x, float* y", "*y = log2_approx(x);", ["lg2.approx.ftz.f32 out, x;"]),
        ("float x, float* y", "*y = reciprocal_approx(x);", ["rcp.approx.ftz.f32 out, x;"]),
        ("float x, float* y", "*y = tanh_approx(x);", ["tanh.approx.f32 out, x;"]),
        (
            "float low, float high, uint32_t* y",
            "*y = pack<half_t>(low, high);",
            ["cvt.rn.f16x2.f32 out, high, low;"],
        ),
        (
            "float low, float high, uint32_t* y",
            "*y = pack<bfloat16_t>(low, high);",
            ["cvt.rn.bf16x2.f32 out, high, low;"],
        ),
    ],
    "90a": [
        (
            "Mbarrier* barrier, uint32_t arrivals",
            "mbarrier_init(barrier, arrivals);",
            ["mbarrier.init.shared::cta.b64 [shared(barrier)], arrivals;"],
        ),
        (NOTHING, "fence_barrier_init();", ["fence.mbarrier_init.release.cluster;"]),
        ("Mbarrier* bar", "mbarrier_arrive(bar);", ["mbarrier.arrive.shared::cta.b64 _, [shared(bar)];"]),
        (
            "Mbarrier* barrier, uint32_t bytes",
            "mbarrier_arrive_expect_tx(barrier, bytes);",
            ["mbarrier.arrive.expect_tx.shared::cta.b64 _, [shared(barrier)], bytes;"],
        ),
        (
            "Mbarrier* barrier, uint32_t bytes",
            "mbarrier_expect_tx(barrier, bytes);",
            ["mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [shared(barrier)], bytes;"],
        ),
        (
            "Mbarrier* barrier, uint32_t rank",
            "mbarrier_arrive_cluster(barrier, rank);",
            [
                ".reg .b32 remote;",
                "mapa.shared::cluster.u32 remote, shared(barrier), rank;",
                "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];",
            ],
        ),
        (
            "Mbarrier* barrier, uint32_t rank",
            "mbarrier_arrive_cluster_read(barrier, rank);",
            [
                ".reg .b32 remote;",
                "mapa.shared::cluster.u32 remote, shared(barrier), rank;",
                "mbarrier.arrive.shared::cluster.b64 _, [remote];",
            ],
        ),
        (
            "Mbarrier* barrier, uint32_t parity, bool* y",
            "*y = mbarrier_try_wait(barrier, parity);",
            [
                PREDICATE,
                "mbarrier.try_wait.parity.shared::cta.b64 p, [shared(barrier)], parity;",
                "selp.b32 out, 1, 0, p;",
            ],
        ),
        (
            "Mbarrier* barrier, uint32_t parity, bool* y",
            "*y = mbarrier_try_wait_cluster(barrier, parity);",
            [
                PREDICATE,
                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [shared(barrier)], parity;",
                "selp.b32 out, 1, 0, p;",
            ],
        ),
        (NOTHING, "fence_proxy_async();", ["fence.proxy.async.shared::cta;"]),
        (NOTHING, "fence_proxy_async_global();", ["fence.proxy.async.global;"]),
        (NOTHING, "increase_registers<240>();", ["setmaxnreg.inc.sync.aligned.u32 240;"]),
        (NOTHING, "decrease_registers<24>();", ["setmaxnreg.dec.sync.aligned.u32 24;"]),
        (
            "int* y",
            "*y = elect_one();",
            [PREDICATE, "elect.sync _|p, 0xffffffff;", "selp.b32 out, 1, 0, p;"],
        ),
        ("uint32_t* y", "*y = cluster_rank();", ["mov.u32 out, %cluster_ctarank;"]),
        ("uint32_t* y", "*y = cluster_blocks();", ["mov.u32 out, %cluster_nctarank;"]),
        (NOTHING, "cluster_arrive();", ["barrier.cluster.arrive.release.aligned;"]),
        (NOTHING, "cluster_wait();", ["barrier.cluster.wait.acquire.aligned;"]),
        ("float* x, uint32_t rank, float** y", "*y = map_shared(x, rank);", ["mapa.u64 out, x, rank;"]),
        *(
            (
                "void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d",
                f"uint32_t m[] = {{{given}}}; stmatrix_{count}{name}(row, m);",
                [f"stmatrix.sync.aligned.m8n8.{count}{modifier}.shared.b16 [shared(row)], {{{given}}};"],
            )
            for count, given in (("x4", "a, b, c, d"), ("x2", "a, b"))
            for name, modifier in (("", ""), ("_transposed", ".trans"))
        ),
        (MAP, "tma_prefetch_map(&map);", ["prefetch.tensormap [map];"]),
        *(
            (
                f"void* destination, {MAP}, Mbarrier* barrier, {named(n, 'int ')}",
                f"tma_load_{n}d(destination, &map, barrier, {named(n)}{policy});",
                [
                    f"cp.async.bulk.tensor.{n}d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                    f"[shared(destination)], [map, {{{named(n)}}}], [shared(barrier)], {hint};"
                ],
            )
            for n in (2, 3, 4, 5)
            for policy, hint in (
                ("", EVICT_NORMAL),
                (", CachePolicy::kEvictFirst", EVICT_FIRST),
                (", CachePolicy::kEvictLast", EVICT_LAST),
            )
        ),
        (
            f"void* destination, {MAP}, Mbarrier* barrier, uint16_t blocks, {named(4, 'int ')}",
            f"tma_load_4d_multicast(destination, &map, barrier, blocks, {named(4)});",
            [
                "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                f".L2::cache_hint [shared(destination)], [map, {{{named(4)}}}], [shared(barrier)], blocks, "
                f"{EVICT_NORMAL};"
            ],
        ),
        *(
            (
                f"{MAP}, const void* source, {named(n, 'int ')}",
                f"{name}_{n}d(&map, source, {named(n)});",
                [f"{instruction.format(n)} [map, {{{named(n)}}}], [shared(source)];"],
            )
            for n in (2, 3, 4, 5)
            for name, instruction in (
                ("tma_store", "cp.async.bulk.tensor.{}d.global.shared::cta.bulk_group"),
                ("tma_reduce_add", "cp.reduce.async.bulk.tensor.{}d.global.shared::cta.add.bulk_group"),
            )
        ),
        (
            "void* destination, const void* source, uint32_t bytes, Mbarrier* barrier",
            "bulk_load(destination, source, bytes, barrier);",
            [
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [shared(destination)], [source], "
                "bytes, [shared(barrier)];"
            ],
        ),
        (
            "void* destination, const void* source, uint32_t bytes",
            "bulk_store(destination, source, bytes);",
            ["cp.async.bulk.global.shared::cta.bulk_group [destination], [shared(source)], bytes;"],
        ),
        (
            "float* destination, const float* source, uint32_t bytes",
            "bulk_reduce_add(destination, source, bytes);",
            [
                "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [destination], [shared(source)], bytes;"
            ],
        ),
        (NOTHING, "bulk_commit();", ["cp.async.bulk.commit_group;"]),
        (NOTHING, "bulk_wait_read<1>();", ["cp.async.bulk.wait_group.read 1;"]),
        (NOTHING, "bulk_wait<1>();", ["cp.async.bulk.wait_group 1;"]),
        (NOTHING, "wgmma_fence();", ["wgmma.fence.sync.aligned;"]),
        (NOTHING, "wgmma_commit();", ["wgmma.commit_group.sync.aligned;"]),
        (NOTHING, "wgmma_wait<1>();", ["wgmma.wait_group.sync.aligned 1;"]),
    ],
}


def multiply(dtype: str, n: int, a: str, a_across: bool, b_across: bool) -> tuple[str, str, list[str]]:
    """A wgmma with N = n, A in "shared" memory or "registers", operands along or across K."""
    across = {True: "Operand::kAcrossK", False: "Operand::kAlongK"}
    layouts = across[b_across] if a == "registers" else f"{across[a_across]}, {across[b_across]}"
    in_registers = a == "registers"
    declared = ", ".join(f"uint32_t a{i}" for i in range(4)) if in_registers else "uint64_t a"
    statement = (
        f"float d[{n // 2}]; for (int i = 0; i < {n // 2}; ++i) d[i] = acc[i]; "
        + ("const uint32_t a[] = {a0, a1, a2, a3}; " if in_registers else "")
        + f"wgmma<{dtype}, {layouts}>(d, a, b, accumulate != 0); "
        f"for (int i = 0; i < {n // 2}; ++i) y[i] = d[i];"
    )
    name = {"half_t": "f16", "bfloat16_t": "bf16"}[dtype]
    accumulators = ", ".join(f"acc[{i}]" for i in range(n // 2))
    operand = "{a0, a1, a2, a3}" if in_registers else "a"
    transposes = f"{int(b_across)}" if in_registers else f"{int(a_across)}, {int(b_across)}"
    return (
        f"const float* acc, {declared}, uint64_t b, int accumulate, float* y",
        statement,
        [
            PREDICATE,
            "setp.ne.b32 p, selp(1, 0, setp(accumulate, 0)), 0;",
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} {{{accumulators}}}, {operand}, b, "
            f"p, 1, 1, {transposes};",
        ],
    )


MULTIPLIES = [
    *(multiply("bfloat16_t", n, "shared", n % 16 == 0, n % 32 == 0) for n in range(8, 257, 8)),
    *(multiply("half_t", n, "registers", False, n % 16 == 0) for n in range(8, 257, 8)),
    *(multiply("half_t", 64, "shared", a, b) for a in (False, True) for b in (False, True)),
    *(multiply("bfloat16_t", 64, "registers", False, b) for b in (False, True)),
]


def test_every_wrapper_with_an_instruction_is_here() -> None:
    headers = (ROOT / "csrc" / "device").glob("*.cuh")
    functions = [
        function
        for path in headers
        for function in re.findall(
            r"FASTATTN_DEVICE \w[^;{]*?(\w+)\([^;{]*\) \{\n(.*?)\n\}", path.read_text(), re.DOTALL
        )
    ]
    special = {
        name for name, body in functions if "asm" in body and '"": ' not in body and '("" ' not in body
    }
    statements = " ".join(statement for rows in WRAPPERS.values() for _, statement, _ in rows)
    assert len(special) > 40
    assert {name for name in special if not re.search(rf"\b{name}[<(]", statements)} == set()


def test_swapped_operands_show(tmp_path) -> None:
    parameters, _, expected = next(row for row in WRAPPERS["80"] if "pack<half_t>" in row[1])
    call = Call("0", parameters, "*y = pack<half_t>(high, low);")
    assert instructions(compile_ptx([call], "80", tmp_path), call) != expected


@pytest.mark.parametrize("arch", ["80", "90a", "wgmma"])
def test_instructions(arch: str, tmp_path) -> None:
    rows = MULTIPLIES if arch == "wgmma" else WRAPPERS[arch]
    calls = [Call(str(i), parameters, statement) for i, (parameters, statement, _) in enumerate(rows)]
    ptx = compile_ptx(calls, "90a" if arch == "wgmma" else arch, tmp_path)
    for call, (_, statement, expected) in zip(calls, rows):
        assert instructions(ptx, call) == expected, statement
