"""Random input and random damage: a reader gives what is right, or an error that is meant for a user.

The suite tries a few dozen inputs each. `HYPOTHESIS_PROFILE=hand python -m pytest tests/test_fuzz.py` tries a thousand.
"""

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdpo.checkpoint import resume
from fastdpo.data.packing import shared_prefix_batch
from fastdpo.data.prepare import tokenize_row
from fastdpo.data.sampler import BudgetSampler
from fastdpo.head.linear_logprobs import linear_logprobs
from fastdpo.reference.cache import TokenCache, entry_key
from fastdpo.settings.config_file import read_settings
from fastdpo.untrusted.json_files import too_deep
from fastdpo.untrusted.model_folder import check_model_folder
from fastdpo.untrusted.yaml_file import parse, read_yaml
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.trainers import lora, make_trainer, rows

BY_HAND = os.environ.get("HYPOTHESIS_PROFILE") == "hand"
HEALTH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]


def examples(few: int, many: int) -> Any:
    """The number of inputs to try in the suite, and by hand."""
    return settings(
        max_examples=many if BY_HAND else few,
        deadline=None,
        derandomize=not BY_HAND,
        database=None,
        suppress_health_check=HEALTH,
    )


texts = st.text(max_size=12) | st.sampled_from(["<eos>", "<bos>", "user", "assistant", "[{", "{}", "null", "\ud800"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
message = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "name", "function", "from", "value"]), anything, max_size=4
) | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": texts})
values = (
    anything | st.lists(message, max_size=3) | st.lists(message, max_size=3).map(lambda m: json.dumps(m, default=str))
)


def refusal(call: Callable[[], Any], *kinds: type[Exception]) -> str | None:
    """Return the message of an error of these kinds, which a user is meant to see; None if there is no error."""
    try:
        call()
    except kinds as error:
        return str(error)
    return None


# Rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@examples(30, 1_000)
@given(
    kind=st.sampled_from(["preference", "ranked", "unpaired"]),
    row=st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("prompt", "chosen", "rejected", "responses", "completion", "tools"), values),
            **dict.fromkeys(("label", "chat_template_kwargs", "weight", "pair_index", "prompt_ids"), anything),
        },
    ),
)
def test_a_row_is_tokenised_or_its_problem_named(tokenizer: Any, kind: str, row: dict[str, Any]) -> None:
    found = tokenize_row(row, 3, tokenizer, max_length=20, vocab_size=300, kind=kind)
    assert found["problem"] or all(0 <= i < 300 for i in found["prompt_ids"])
    assert not found["problem"] or not found["prompt_ids"]
    assert "\n" not in found["problem"]


@examples(60, 1_000)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["prompt_ids", "chosen_ids", "rejected_ids", "weight", "beta", "pair_index", "ranked_ids"]),
            st.lists(st.integers(-1, 9), max_size=4) | anything,
            max_size=7,
        ),
        max_size=3,
    )
)
def test_the_collator_packs_rows_or_names_the_bad_one(rows: list[dict[str, Any]]) -> None:
    if (message := refusal(lambda: shared_prefix_batch(rows), ValueError)) is not None:
        assert "\n" not in message
        return
    batch = shared_prefix_batch(rows)
    tokens = sum(len(row["prompt_ids"]) + len(each) for row in rows for each in _responses(row))
    assert batch["num_tokens"] == tokens


def _responses(row: dict[str, Any]) -> list[Any]:
    return row["ranked_ids"] if "ranked_ids" in row else [row["chosen_ids"], row["rejected_ids"]]


@examples(40, 1_000)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 2**20), st.integers(1, 9)), min_size=1, max_size=40).map(np.array),
    budget=st.integers(1, 2**20),
    seed=st.integers(-(2**70), 2**70),
    ranks=st.integers(1, 5),
)
def test_the_sampler_deals_out_every_example(sizes: Any, budget: int, seed: int, ranks: int) -> None:
    found = [BudgetSampler(sizes, tokens_per_batch=budget, seed=seed, rank=r, world_size=ranks) for r in range(ranks)]
    dealt = [i for sampler in found for batch in sampler for i in batch]
    assert set(dealt) == set(range(len(sizes)))
    assert len({len(list(sampler)) for sampler in found}) == 1


# Settings


@examples(80, 1_000)
@given(
    data=st.binary(max_size=60)
    | st.text(st.sampled_from("ab:-[]{}&*!<>|'\" \n\t#,?0_.1e"), max_size=60).map(str.encode)
)
def test_a_config_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    assert refusal(lambda: read_settings(path, {}), ValueError, OSError)  # none of these names a dataset


@examples(60, 1_000)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(max_codepoint=0xD7FF), max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_", min_size=1), inner, max_size=3),
        max_leaves=9,
    )
)
def test_json_is_yaml(value: Any) -> None:
    assert parse(json.dumps(value)) == value


@examples(30, 1_000)
@given(number=st.integers(0, 10**6), zeros=st.integers(0, 3), at=st.integers(1, 5))
def test_digits_are_decimal_and_underscores_text(tmp_path: Path, number: int, zeros: int, at: int) -> None:
    digits = "0" * zeros + str(number)
    (tmp_path / "a.yaml").write_text(f"seed: {digits}\nname: {digits}\n")
    assert read_yaml(tmp_path / "a.yaml", {"name"}) == {"seed": number, "name": digits}
    grouped = f"{digits[:at]}_{digits[at:]}"
    assert parse(grouped) == grouped


# JSON


json_values = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('[]{}"\\a\n'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"\\', max_size=3), inner, max_size=3),
    max_leaves=12,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@examples(80, 1_000)
@given(
    rows=st.lists(st.tuples(json_values, st.sampled_from([None, 1])), min_size=1, max_size=4), limit=st.integers(0, 5)
)
def test_the_depth_of_json_lines_is_found(rows: list[tuple[Any, int | None]], limit: int) -> None:
    text, first, line = "", None, 1
    for value, indent in rows:
        written = json.dumps({"a": value}, indent=indent)
        if first is None and depth_of({"a": value}) > limit:
            first = range(line, line + written.count("\n") + 1)
        text += written + "\n"
        line += written.count("\n") + 1
    found = too_deep(io.BytesIO(text.encode()), limit)
    assert (found is None) == (first is None)
    assert first is None or found in first


@examples(40, 1_000)
@given(config=anything | st.dictionaries(st.sampled_from(["weight_map", "attn_implementation", "a"]), anything))
def test_a_model_folder_is_accepted_or_refused(tmp_path: Path, config: Any) -> None:
    for name in ("config.json", "model.safetensors.index.json", "adapter_config.json"):
        (tmp_path / name).write_text(json.dumps(config), encoding="utf-8", errors="replace")
    assert (refusal(lambda: check_model_folder("model", tmp_path), ValueError) or "model: ").startswith("model: ")


# The head


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of NumPy, in Triton's interpreter
@examples(15, 1_000)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 200), st.integers(1, 20)),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    temperature=st.sampled_from([0.1, 1.0, 7.0]),
    has_bias=st.booleans(),
    backward=st.sampled_from(["exact", "auto", "sparse"]),
    trained=st.booleans(),
    impl=st.sampled_from(["torch", "triton", "blas"]),
)
def test_the_head_is_the_plain_formula(
    sizes: tuple[int, int, int],
    seed: int,
    scale: float,
    softcap: float | None,
    temperature: float,
    has_bias: bool,
    backward: Any,
    trained: bool,
    impl: Any,
) -> None:
    if impl != "torch" and not torch.cuda.is_available():
        pytest.importorskip("triton")
    (N, V, D), generator = sizes, torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64) if has_bias else None
    targets = torch.randint(0, V, (N,), generator=generator)
    upstream = torch.randn(N, generator=generator, dtype=torch.float64)

    def run(impl: Any, backward: Any) -> list[torch.Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        options = {"softcap": softcap, "temperature": temperature, "impl": impl, "backward": backward}
        logps = linear_logprobs(*leaves, targets, bias, **options)
        (logps * upstream).sum().backward()
        return [logps.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    true, found = run("eager", "exact"), run(impl, backward)
    assert len(true) == len(found)
    for a, b in zip(found, true, strict=True):
        assert torch.isfinite(a).all()
        # a sparse backward may skip 0.005 of the rows' gradients, times the distance of two rows of weight
        skips = 0.1 if backward == "sparse" and a is not found[0] else 1e-9
        assert float((a - b).norm()) <= skips * (1 + float(b.norm()))


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output folder of a run with LoRA that saved three checkpoints, and what the run is."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("trained")
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "data": rows(13)}
    trainer = make_trainer(folder, peft_config=lora(), **settings)
    trainer.train()
    return folder / "out", trainer._identity


@examples(60, 1_000)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_damage_to_checkpoints_is_never_resumed_from(
    trained: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """The checkpoint that is chosen has every file as it was written; a damaged one is never newer and chosen."""
    (source, identity), chance = trained, random.Random(seed)
    output = Path(shutil.copytree(source, tmp_path_factory.mktemp("damaged") / "out"))
    for _ in range(chance.randint(1, 5)):
        files = sorted(path for path in output.rglob("*") if path.is_file())
        damage(chance.choice(files), files, chance)
    whole = [
        step for step in (3, 2, 1) if _files(output / f"checkpoint-{step}") == _files(source / f"checkpoint-{step}")
    ]
    found = resume.begin(output, "auto", identity)
    if found is None:
        assert not whole
    else:
        step = int(found.folder.name.rpartition("-")[2])
        written = _files(source / f"checkpoint-{step}")
        assert {name: _files(found.folder).get(name) for name in written} == written
        assert step == whole[0]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The cache


@examples(40, 1_000)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_damage_to_the_cache_is_never_read(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance, folder = random.Random(seed), tmp_path_factory.mktemp("cache")
    true = {entry_key([i], [1, i]): np.linspace(-2, -1 - i, i, dtype=np.float32) for i in range(6)}
    for start in (0, 3):
        TokenCache(folder).add(dict(list(true.items())[start : start + 3]))
    for _ in range(chance.randint(1, 4)):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if files:
            damage(chance.choice(files), files, chance)
    found = TokenCache(folder)
    for key, value in true.items():
        assert key not in found or np.array_equal(found[key], value)
    assert len(found) <= len(true)
    with found.filling():
        found.add(true)
    again = TokenCache(folder)
    assert all(np.array_equal(again[key], value) for key, value in true.items())


def damage(path: Path, files: list[Path], chance: random.Random) -> None:
    """Do something to a file that a disk, a user or another program could do."""
    raw = bytearray(path.read_bytes())
    at = chance.randrange(len(raw) + 1)
    how = chance.choice(["flip", "cut", "insert", "swap", "remove", "empty", "pipe", "folder", "zeros"])
    if how == "flip" and raw:
        raw[at % len(raw)] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del raw[at:]
    elif how == "insert":
        raw[at:at] = chance.randbytes(3)
    elif how == "swap":
        raw = bytearray(chance.choice(files).read_bytes())
    elif how == "empty":
        raw.clear()
    elif how == "zeros":
        raw[at:] = bytes(len(raw) - at)
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "remove":
        path.write_bytes(raw)
