"""bench.cuda_check: what it reads from a disassembly, what it refuses, and a few kernels compiled for GPUs on this machine."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install longvita[triton]")

from bench import cuda_check, cuda_cpp  # noqa: E402

_SASS = """
.L_x_0:
        /*0010*/ STL [R1], R2 ;
.L_x_1:
        /*0020*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/ {inner} ;
        /*0040*/ @P0 BRA `(.L_x_1) ;
        /*0050*/ LDL R2, [R1] ;
        /*0060*/ @P1 BRA `(.L_x_0) ;
        /*0070*/ BRA `(.L_x_2) ;
.L_x_2:
"""
_RESOURCES = "Function k: REG:168 STACK:8 SHARED:0 LOCAL:0"
GOOD = {
    "registers": 168, "stack": 8, "shared": 1024, "spills": 2, "loop_spills": 0, "multiplies_with": ["HGMMA"], "main_loops": 1,
}  # fmt: skip


def test_a_loop_that_waits_inside_the_main_loop_hides_nothing():
    waits = ".L_x_7:\n SYNCS.PHASECHK P0 ;\n @!P0 BRA `(.L_x_7) ;\n LDL R2, [R1]"
    found = cuda_check.figures(_SASS.format(inner=waits), _RESOURCES, 1024, True)
    assert (found["main_loops"], found["loop_spills"], found["multiplies_with"]) == (1, 1, ["HGMMA"])


def test_only_the_innermost_loop_counts():
    assert cuda_check.figures(_SASS.format(inner="MOV R1, R2"), _RESOURCES, 1024, True) == GOOD
    spilled = cuda_check.figures(_SASS.format(inner="LDL R2, [R1]"), _RESOURCES, 1024, True)
    assert spilled["loop_spills"] == 1 and spilled["spills"] == 3
    assert cuda_check.figures(_SASS.replace("HGMMA", "FFMA").format(inner="LDL"), _RESOURCES, 0, False)["loop_spills"] == 1


@pytest.mark.parametrize(
    ("change", "capability", "matrix", "words"),
    [
        ({"loop_spills": 3}, 80, False, "3 instructions in its main loop move spilled registers"),
        ({"shared": 170_000}, 80, True, "170000 bytes of shared memory; sm_80 has 166912"),
        ({"shared": 101_377, "multiplies_with": ["HMMA"]}, 89, True, "101377 bytes of shared memory; sm_89 has 101376"),
        ({"multiplies_with": ["HMMA"]}, 90, True, "multiplies with HMMA, not with wgmma"),
        ({"multiplies_with": [], "main_loops": 0}, 100, True, "no loop of it multiplies matrices"),
    ],
)
def test_what_is_refused(change, capability, matrix, words):
    (found,) = cuda_check.problems("k", capability, matrix, GOOD | change)
    assert words in found


def test_what_passes():
    assert not cuda_check.problems("k", 90, True, GOOD)
    assert not cuda_check.problems("k", 80, True, GOOD | {"multiplies_with": ["HMMA"]})
    assert not cuda_check.problems("k", 90, False, GOOD | {"multiplies_with": [], "main_loops": 0})


def test_regressions():
    assert not cuda_check.regressions("k", 90, GOOD | {"registers": 175}, GOOD)
    for change in ({"registers": 176}, {"stack": 9}, {"shared": 1025}, {"spills": 3}):
        (what,) = change
        assert f"{what} rose from {GOOD[what]} to {change[what]}" in cuda_check.regressions("k", 90, GOOD | change, GOOD)[0]
    assert "not in compile.json" in cuda_check.regressions("k", 90, GOOD, None)[0]


def _kept(part):
    table = json.loads(cuda_check.TABLE.read_text())[part]
    return {(name, int(arch.removeprefix("sm_"))): found for name, row in table.items() for arch, found in row.items()}


def test_the_table_names_kernels_that_exist_and_pass():
    """That it names all of them is for make cuda-check to say, which compiles them."""
    kept, specs = _kept("kernels"), cuda_check.specs()
    assert kept and set(kept) <= set(specs)
    for (name, capability), found in kept.items():
        assert not cuda_check.problems(name, capability, specs[name, capability].matrix, found)


def test_the_table_names_files_in_cuda_cpp_that_exist_and_pass():
    kept, there = _kept("cuda_kernels"), {(source.name, cuda_cpp.capability(architecture)) for source, architecture in cuda_cpp.units()}
    assert kept and {(name.split()[0], capability) for name, capability in kept} <= there
    for (name, capability), found in kept.items():
        file, kernel = name.split(maxsplit=1)
        assert not cuda_check.problems(name, capability, cuda_cpp.matrix(cuda_cpp.FOLDER / file, kernel), found)


@pytest.mark.parametrize(
    ("written", "short"),
    [
        ("void longvita::cuda::(anonymous namespace)::few_rows_kernel<float, true>(longvita::Args, int)", "few_rows_kernel<float, true>"),
        ("void a::k<(longvita::DType)1, 128>(a::Map<int (*)(int)>)", "k<(DType)1, 128>"),
        ("longvita::plain_kernel(int)", "plain_kernel"),
    ],
)
def test_names_of_kernels(written, short):
    assert cuda_cpp.short_name(written) == short


def test_what_a_file_says_of_itself(tmp_path):
    file = tmp_path / "k.cu"
    file.write_text("// architectures: sm_80 sm_90a\n// wgmma: forward_kernel keys_\n")
    assert cuda_cpp.architectures(file) == ("sm_80", "sm_90a") and [cuda_cpp.capability(a) for a in ("sm_80", "sm_100a")] == [80, 100]
    assert (
        cuda_cpp.matrix(file, "forward_kernel<128>") and cuda_cpp.matrix(file, "keys_kernel") and not cuda_cpp.matrix(file, "rows_kernel")
    )
    file.write_text("#include <x>\n")
    with pytest.raises(ValueError, match="k.cu begins with '#include <x>'; expected a line like '// architectures: sm_80 sm_90a sm_100a'"):
        cuda_cpp.architectures(file)
    assert not cuda_cpp.matrix(file, "forward_kernel")


def test_a_missing_nvcc_is_a_failure_unless_it_is_accepted(monkeypatch, capsys):
    monkeypatch.setattr(cuda_cpp.shutil, "which", lambda name: None)
    assert cuda_check.main(["--no-triton", "--only", "merge_attention.cu"]) == 1
    assert (
        "nvcc was not found, and csrc/cuda/ needs it. Remedy: put CUDA's bin folder on the PATH, or --no-cuda-cpp"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):  # then nothing is left of this name
        cuda_check.main(["--no-cuda-cpp", "--only", "merge_attention.cu"])


def test_the_parts_of_the_table_are_kept_apart(tmp_path, monkeypatch):
    table = tmp_path / "compile.json"
    table.write_text('{"triton": "0", "kernels": {"a": {"sm_90": 1}}, "nvcc": "0", "cuda_kernels": {"old.cu k": {"sm_90": 2}}}')
    monkeypatch.setattr(cuda_check, "TABLE", table)
    monkeypatch.setattr(cuda_cpp, "version", lambda: "13.0.88")
    cuda_check._keep({"nvcc": {("new.cu k", 90): GOOD}}, whole=(90,))
    kept = json.loads(table.read_text())
    assert kept["kernels"] == {"a": {"sm_90": 1}} and kept["triton"] == "0"
    assert kept["cuda_kernels"] == {"new.cu k": {"sm_90": GOOD}} and kept["nvcc"] == "13.0.88"
    assert not cuda_check._compare({"nvcc": {("new.cu k", 90): GOOD}}, whole=(90,))
    assert "spills rose" in cuda_check._compare({"nvcc": {("new.cu k", 90): GOOD | {"spills": 3}}}, whole=(90,))[0]
    assert "no kernel is called so" in cuda_check._compare({"nvcc": {}}, whole=(90,))[0]


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_a_kernel_compiles_here(capability, capsys):
    kernel = "masked_lm_head forward, few rows bf16"
    assert cuda_check.main(["--only", kernel, "--capability", str(capability), "--jobs", "1"]) == 0
    assert {80: " HMMA", 90: " HGMMA", 100: " UTCHMMA", 120: " HMMA"}[capability] in capsys.readouterr().out


def test_blocks_too_small_for_wgmma_are_found(monkeypatch):
    key = ("masked_lm_head forward, few rows bf16", 90)
    small = replace(cuda_check.specs()[key], constexprs=cuda_check.specs()[key].constexprs | {"BLOCK_M": 32})
    monkeypatch.setitem(cuda_check.specs(), key, small)
    _, found = cuda_check.compile_one(key)
    assert "not with wgmma" in cuda_check.problems(*key, True, found)[0]
