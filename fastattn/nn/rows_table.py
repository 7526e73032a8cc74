"""The fastest products of a few rows on CPUs that were measured; `python benchmarks/rows.py --write` writes it.

FASTEST[instructions of the CPU][dtype]: up to how many rows (None: any number) which of `rows.PRODUCTS`.
"""

FASTEST: dict[str, dict[str, tuple[tuple[int | None, str], ...]]] = {
    "AVX2": {
        "float32": ((1, "linear"), (None, "packed")),
        "bfloat16": ((None, "linear"),),
        "float16": ((1, "one by one"), (None, "linear")),
    },
    "AVX512+VNNI": {
        "float32": ((None, "packed"),),
        "bfloat16": ((None, "packed"),),
        "float16": ((None, "linear"),),
    },
    "AVX512+VNNI, Intel": {
        "float32": ((1, "vectors"), (None, "packed")),
        "bfloat16": ((1, "vectors"), (None, "packed")),
        "float16": ((1, "one by one"), (None, "linear")),
    },
}
