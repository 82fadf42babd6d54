"""What the Triton kernels compile to for GPUs that are not here: see ahead_of_time.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slow import wanted

STATISTICS = "outlier_statistics_partial_kernel"
MERGE = "outlier_statistics_merge_kernel"
GRADIENT = "outlier_statistics_backward_gradient_kernel"
FAKE_QUANT = "fake_quant_forward_kernel"
FAKE_QUANT_GRADIENT = "fake_quant_backward_backward_kernel"
ERRORS = "quantization_errors_errors_kernel"

# of each tensor, in registers at once
ELEMENTS_PER_THREAD = {
    STATISTICS: 32,
    GRADIENT: 16,
    FAKE_QUANT: 32,
    FAKE_QUANT_GRADIENT: 32,
    ERRORS: 16,
}
KERNELS = {*ELEMENTS_PER_THREAD, MERGE}
READING_ONE = {STATISTICS, FAKE_QUANT, ERRORS}
WIDE_LOADS = {"ld.global.v4.b32", "global_load_dwordx4", "buffer_load_dwordx4"}
WIDE_SAMPLE_LOADS = {*WIDE_LOADS, "flat_load_dwordx4"}
WIDE_STORES = {"st.global.v4.b32", "global_store_dwordx4", "buffer_store_dwordx4"}
# with 128 threads, 128 registers leave room for four programs on a multiprocessor, and 96 for five
REGISTERS = {
    STATISTICS: 128,
    GRADIENT: 96,
    FAKE_QUANT: 96,
    FAKE_QUANT_GRADIENT: 96,
    ERRORS: 128,
}
# Instructions of a thread per element, those of rare branches included. While an H200
# moves the bytes of an element of bfloat16, a thread can do 15 for the statistics, 31 for fake
# quantization and 46 for a gradient. Some do more in the cases "vision" and "padded", where a third
# or a sixth of the elements is sampled.
BUDGET = {
    STATISTICS: 15,
    GRADIENT: 46,
    FAKE_QUANT: 31,
    FAKE_QUANT_GRADIENT: 46,
    ERRORS: 30,  # and candidate
}
SAMPLED_BUDGET = {STATISTICS: 25, GRADIENT: 57}

TARGETS = ["sm_80", "sm_90", "gfx942"]


@pytest.fixture(scope="module")
def all_audits(request):
    """Compile in a process of its own: this one may interpret Triton, and that cannot be undone."""
    script = Path(__file__).with_name("ahead_of_time.py")
    targets = wanted(request, "audits")
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, script, *targets], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(params=TARGETS)
def audits(request, all_audits):
    return [audit for audit in all_audits if audit["target"] == request.param]


def check(audits, holds):
    broken = [
        {name: value for name, value in audit.items() if name != "instructions"}
        for audit in audits
        if not holds(audit)
    ]
    assert not broken


def mnemonics(audit, *parts):
    return [name for name in audit["instructions"] if any(part in name for part in parts)]


def streams(audits):
    """The kernels and cases whose speed is that of the memory."""
    return [audit for audit in audits if audit["kernel"] != MERGE and is_regular(audit)]


def is_regular(audit):
    return audit["case"] not in ("one", "convolution", "odd padded")


def test_every_kernel_is_compiled(audits):
    assert {audit["kernel"] for audit in audits} == KERNELS
    check(audits, lambda audit: len(audit["instructions"]) > 50)


def test_a_program_fits_a_multiprocessor(audits):
    check(audits, lambda audit: audit["threads"] <= 1024 and audit["shared"] <= 48 * 1024)
    check(streams(audits), lambda audit: audit["registers"] <= REGISTERS[audit["kernel"]])


def test_nothing_spills(audits):
    wide_merge = [audit for audit in audits if (audit["kernel"], audit["type"]) == (MERGE, "fp32")]
    others = [audit for audit in audits if audit not in wide_merge]
    check(others, lambda audit: audit["spills"] == 0)
    # 1,024 threads have 64 registers each, and those of float32 load 64 keys: some spill once
    check(wide_merge, lambda audit: audit["spills"] <= 128)
    check(audits, lambda audit: audit.get("loop_spills", 0) == 0)
    looping = [audit for audit in audits if audit["kernel"] in (STATISTICS, MERGE)]
    check(looping, lambda audit: audit.get("loops", 1) > 0)


def test_memory_is_accessed_16_bytes_at_a_time(audits):
    for audit in streams(audits):
        # 16 bytes are 8 elements, or 4 of float32
        half_width = audit["type"] != "fp32"
        loads = len([name for name in audit["instructions"] if name in WIDE_LOADS])
        stores = len([name for name in audit["instructions"] if name in WIDE_STORES])
        elements = ELEMENTS_PER_THREAD[audit["kernel"]] // (8 if half_width else 4)
        tensors_read = 1 if audit["kernel"] in READING_ONE else 2
        assert loads >= elements * tensors_read, audit["case"]
        if audit["kernel"] not in (STATISTICS, ERRORS):  # which store sums and samples
            assert stores == elements, audit["case"]


def test_the_merge_reads_samples_16_bytes_at_a_time(audits):
    merges = [audit for audit in audits if audit["kernel"] == MERGE and is_regular(audit)]
    check(merges, lambda audit: not mnemonics(audit, "ld.global.b16", "load_ushort"))
    check(merges, lambda audit: any(name in audit["instructions"] for name in WIDE_SAMPLE_LOADS))


def test_instructions_per_element(audits):
    for audit in streams(audits):
        if audit["target"] != "sm_90" or audit["type"] != "bf16":
            continue
        budget = BUDGET | (SAMPLED_BUDGET if audit["case"] in ("vision", "padded") else {})
        count = audit["main_loop"] / ELEMENTS_PER_THREAD[audit["kernel"]]
        assert count <= budget[audit["kernel"]], (audit["kernel"], audit["case"], count)


def test_nothing_is_atomic(audits):
    check(audits, lambda audit: not mnemonics(audit, "atom"))
    reductions = ("red.", "redg.", "global_red", "buffer_red")  # st.shared.b32 is none
    check(audits, lambda a: not [n for n in a["instructions"] if n.startswith(reductions)])


def test_every_rounding_is_the_definition_s(audits):
    names = (FAKE_QUANT, FAKE_QUANT_GRADIENT, ERRORS)
    quantizing = [audit for audit in audits if audit["kernel"] in names]
    check(quantizing, lambda audit: mnemonics(audit, "div.rn.f32", "v_div_fixup_f32"))
    if audits[0]["target"].startswith("sm_"):
        # gfx942 divides by way of these
        check(audits, lambda audit: not mnemonics(audit, "fma", "mad.rn", "rcp"))
        check(audits, lambda audit: not mnemonics(audit, ".approx", ".full", ".ftz"))


def test_the_median_s_gradient_is_stored_after_the_others(audits):
    """One program stores all elements, then, behind a barrier, those at the median again."""
    narrow = ("st.global.b16", "st.global.b32", "global_store_short", "global_store_dword")
    sparse = [
        audit
        for audit in audits
        if audit["kernel"] == GRADIENT and audit["case"] in ("long", "vision")
    ]
    assert sparse
    for audit in sparse:
        names = audit["instructions"]
        dense = [at for at, name in enumerate(names) if name in WIDE_STORES]
        sparse_stores = [at for at, name in enumerate(names) if name in narrow]
        barriers = [at for at, name in enumerate(names) if name.startswith(("bar", "s_barrier"))]
        assert dense
        assert sparse_stores
        assert any(max(dense) < barrier < min(sparse_stores) for barrier in barriers)
