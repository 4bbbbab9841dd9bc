"""README and docs say what there is: their Python runs, their links, flags and files exist.

A page's Python blocks are one program. README's is a loop over names of the reader's own, which are
given here; those of the other pages run as they stand, in a process of their own.
"""

import ast
import contextlib
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from pages import (
    CODE,
    CONTRIBUTING,
    LINK,
    PACKAGE,
    PAGES,
    README,
    ROOT,
    blocks,
    broken_links,
    missing_files,
    name_of,
    unknown_flags,
)

from megatron_default_moe import UserError

# The Python


def given() -> dict[str, Any]:
    """The names that README's loop leaves to the reader."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=12,
        num_attention_heads=2,
        num_moe_experts=5,
        moe_router_topk=1,
        moe_ffn_hidden_size=20,
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        transformer_impl="local",
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
    )

    def build(model_config: Any) -> Any:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        builder = model_config.get_builder_cls()(model_config)
        return builder.build_model(groups, pre_process=True, post_process=True)

    def loss(model: Any, tokens: Any) -> Any:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean()

    tokens = torch.randint(100, (3, 2, 4, 8))
    return {
        "transformer_config": config,
        "build": build,
        "loss": loss,
        "batches": tokens,
        "AdamW": torch.optim.AdamW,
    }


def vectors_after(program: str) -> tuple[Any, Any]:
    """The default vectors of the program's ``model``, and how often they were updated."""
    import torch

    from megatron_default_moe.layers import optimizer_step

    names = given()
    exec(compile(program, "README.md", "exec"), names)
    found = list(optimizer_step.routers(names["model"]))
    assert found
    vectors = torch.stack([router.default_vectors for router in found])
    return vectors, torch.stack([router.default_vector_updates for router in found])


def test_the_readmes_loop_trains_default_vectors(one_rank: None) -> None:
    vectors, updates = vectors_after("".join(blocks(README)))
    assert vectors.isfinite().all()
    assert (vectors.norm(dim=-1) > 0).all()
    # A step in which no token went to an expert updates nothing of it.
    assert updates.max() == 3


@pytest.mark.parametrize("call", ["reduce_step_sums", "commit"])
def test_no_call_of_the_readmes_loop_is_superfluous(one_rank: None, call: str) -> None:
    program, removed = re.subn(rf"^ +{call}\(.*\n", "", "".join(blocks(README)), flags=re.M)
    assert removed == 1
    if call == "reduce_step_sums":
        with pytest.raises(RuntimeError, match="sums were not reduced before commit"):
            vectors_after(program)
        return
    with contextlib.suppress(UserError):
        vectors, _ = vectors_after(program)
        assert not vectors.any()


OTHER_PAGES = [page for page in PAGES if page != README and blocks(page)]
CHECK = """
from megatron_default_moe.layers import optimizer_step
routers = list(optimizer_step.routers(model))
assert routers and all(router.default_vectors.any(-1).all() for router in routers)
assert {int(router.default_vector_updates.max()) for router in routers} == {3}
"""


@pytest.mark.parametrize("page", OTHER_PAGES, ids=name_of)
def test_a_pages_program_runs_and_trains_default_vectors(
    page: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """With a check after each of its blocks that takes optimizer steps."""
    program = [block + (CHECK if "commit(model" in block else "") for block in blocks(page)]
    file = tmp_path / "program.py"
    file.write_text("".join(program))
    done = subprocess.run(
        [sys.executable, str(file)], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert sum(CHECK in part for part in program) == page.read_text().count("commit(model, t") - 1
    assert done.returncode == 0, done.stderr[-3000:]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def test_every_line_of_python_is_in_a_block_that_runs() -> None:
    """A block of another spelling (```py, ~~~) would not be run, and its lines would rot."""
    assert README in PAGES
    assert OTHER_PAGES
    for page in PAGES:
        fences = re.findall(r"^(```|~~~)(\w*)", page.read_text(), re.M)
        assert {name for _, name in fences} <= {"", "python"}, page
        assert all(ast.parse(block) for block in blocks(page))


# Links, files and flags


def map_of_the_package() -> str:
    """The table in CONTRIBUTING whose files stand in the room of their row."""
    return re.search(r"^\| room .*?\n(?=\n)", CONTRIBUTING.read_text(), re.M | re.S)[0]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_files_and_flags_exist(page: pathlib.Path) -> None:
    text = page.read_text().replace(map_of_the_package(), "")
    assert list(broken_links(page, text)) == []
    assert list(missing_files(page, text)) == []
    assert list(unknown_flags(text)) == []


def test_what_does_not_exist_is_found() -> None:
    links = "[a](docs/nowhere.md) [b](docs/status.md#nowhere) [c](docs/status.md#status)"
    assert list(broken_links(README, links)) == ["docs/nowhere.md", "docs/status.md#nowhere"]
    files = (
        "`layers/router.py` `plan/` `attic/` `tools/plan.py` python tools/none.py examples/*.yaml"
    )
    assert list(missing_files(README, files)) == ["layers/router.py", "attic/", "tools/none.py"]
    flags = "--num-layers --num-layer `--[no-]default-vector-kernels` `--[no-]paper-default-moe`"
    assert list(unknown_flags(flags)) == ["--num-layer", "--[no-]paper-default-moe"]
    assert list(unknown_flags("--default-vector-* --deflaut-*")) == ["--deflaut-*"]


# The maps


def test_the_map_of_the_package_has_every_file_in_its_room() -> None:
    mapped, room = set(), ""
    for row in map_of_the_package().splitlines()[2:]:
        _, first, files, what, _ = row.split("|")
        room = (CODE.findall(first) or [room])[0]
        mapped |= {room + name for name in CODE.findall(files)} or {room}
        assert what.strip(), row
    package = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    package = {name for name in package if not re.search(r"__(init|main)__\.py$", name)}
    facades = {"functional.py", "patches.py", "entry.py"}
    assert mapped == package - facades


def test_every_page_of_docs_can_be_reached_from_the_readme() -> None:
    reached, open_pages = set(), [README]
    while open_pages:
        page = open_pages.pop()
        reached.add(page)
        for target in LINK.findall(page.read_text()):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.exists() and file not in reached:
                open_pages.append(file)
    assert set((ROOT / "docs").rglob("*.md")) <= reached


def test_the_metrics_page_explains_each_metric() -> None:
    from megatron_default_moe.layers.layer_metrics import NAMES

    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    assert sorted(rows) == sorted(NAMES)


def test_the_numbers_of_the_readme_are_those_of_the_results() -> None:
    """The step times, which a new ``make bench`` changes."""
    table = (ROOT / "docs/results/cpu_overhead.md").read_text()
    ratios = [f"{float(found):.3f}" for found in re.findall(r" (\d\.\d{4}) \| \d\.\d{4} to", table)]
    by_the_clock, of_the_processor = ratios[::2], ratios[1::2]
    assert len(by_the_clock) == len(of_the_processor) == 2
    for page in (README, ROOT / "docs/costs.md"):
        assert all(ratio in page.read_text() for ratio in by_the_clock), page
    assert all(ratio in (ROOT / "docs/costs.md").read_text() for ratio in of_the_processor)


def test_the_citation_file_is_of_this_version() -> None:
    import yaml

    import megatron_default_moe

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == megatron_default_moe.__version__
    paper = citation["references"][0]["title"]
    assert paper in README.read_text()
